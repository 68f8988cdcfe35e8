"""Both sides answer the same prompt with the same checkpoint, each in its own process."""

from pathlib import Path

import pytest

from benchmarks import sides
from benchmarks.prefill import against_peers, measure, table

SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
         "linear_num_key_heads": 1, "linear_num_value_heads": 2, "vocab_size": 512, "head_dim": 64,
         "linear_key_head_dim": 64, "linear_value_head_dim": 64,
         "rope_parameters": {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25, "rope_theta": 10000000,
                             "rope_type": "default", "mrope_interleaved": True}}  # fmt: skip
CASE = sides.Case("tiny", "0.8B", 4, "tiny", SMALL)


def test_sides_compute_the_same(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    rounds = measure(CASE, ["mlx-lm"], tmp_path, rounds=1, tokens=20, new=6)
    (ours, theirs), = rounds  # fmt: skip
    assert ours["tokens"] == theirs["tokens"] and len(ours["tokens"]) == 6
    assert len(ours["later"]) == 5 and all(seconds > 0 for seconds in [ours["first"], *ours["later"]])
    assert 0 < ours["peak"] < ours["resident"]
    assert sides.apart([ours, theirs]) < 1e-3
    how = ("prefill", "prefill 20", CASE, ["mlx-lm"])
    (record,) = against_peers(*how, rounds, lambda answer: answer["first"])
    assert record["same_tokens"] and record["ratio"]["median"] == pytest.approx(theirs["first"] / ours["first"])
    other = ours | {"tokens": [0], "logprobs": [x + 1 for x in ours["logprobs"]]}
    (record,) = against_peers(*how, [(ours, other)], lambda answer: answer["first"])
    assert record["apart"] > 0.01 and "different tokens" in table([record])[-1]


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 8}}')
    with pytest.raises(SystemExit, match="CheckpointError"), sides.Side("ours", tmp_path):
        pass


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    folder = sides.checkpoint(CASE, tmp_path)
    before = (folder / "config.json").stat().st_mtime_ns
    assert sides.checkpoint(CASE, tmp_path) == folder and (folder / "config.json").stat().st_mtime_ns == before
    deeper = sides.Case("tiny", "0.8B", 8, "tiny", SMALL)
    sides.checkpoint(deeper, tmp_path)
    assert (folder / "config.json").stat().st_mtime_ns != before
