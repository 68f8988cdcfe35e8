"""A process whose checkpoint is several times larger than its ceiling stays under it, measured from outside."""

from pathlib import Path

import pytest

from benchmarks.ceiling import measure, size_of
from tests.experts.synthetic import synthetic_config, write_synthetic

# The 35B with smaller matrices, so that Python and what a CPU unpacks leave something of so small a ceiling.
SMALL = {"hidden_size": 1024, "moe_intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1,
         "linear_num_value_heads": 4, "linear_num_key_heads": 2}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what a process held")
def test_a_process_stays_under_its_ceiling(tmp_path: Path) -> None:
    """benchmarks/ceiling.py does the same with whole layers and several GB."""
    config = synthetic_config("35B", 12, vocab_size=4096, **SMALL)
    folder = write_synthetic(tmp_path / "model", config)
    record = measure(folder, config, 4, prompt=300, tokens=6)
    assert size_of(folder) > 1.3e9 and record["memory"] == size_of(folder) // 4
    assert record["peak"] <= record["memory"]
    assert record["records"] > 0 and min(record["slots"]) >= 8
    assert record["share"] > 0.5  # it does use what it was given
