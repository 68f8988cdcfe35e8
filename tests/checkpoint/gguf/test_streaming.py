"""Experts of a GGUF read from where they lie: the bits of the resident model, for every type of block."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.expert_files import expert_layouts
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.layout import deal
from mlx_qwen35.experts.reader import Reader
from tests.checkpoint.gguf.building import config_of, matrices, write_gguf
from tests.checkpoints import random_tensors
from tests.tiny_model import some_tokens

PLAN = StreamPlan(slots=(3, 3), group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)


def written(path, kinds, **kwargs):
    config = config_of("moe")
    write_gguf(path, config, random_tensors(config), kinds, **kwargs)
    return path


def logits(model, pieces=(1, 1, 17, 1)):
    cache, tokens = model.make_cache(), iter(some_tokens(sum(pieces), vocab=290))
    rows = [model(mx.array([[next(tokens) for _ in range(n)]]), cache)[0] for n in pieces]
    return np.concatenate([np.array(row.astype(mx.float32)) for row in rows])


@pytest.mark.parametrize(
    "kind, dtype",
    [("F16", "float32"), ("Q4_K", "float32"), ("mixed", "float32"), ("Q8_0", "bfloat16"), ("MXFP4", "bfloat16")],
)
def test_streamed_is_resident(tmp_path, kind, dtype):
    def mixed(name):
        for word, own in (("gate_exps", "IQ3_S"), ("up_exps", "NVFP4"), ("down_exps", "Q6_K")):
            if word in name:
                return own
        return matrices("Q4_K")(name)

    path = written(tmp_path / "a.gguf", mixed if kind == "mixed" else matrices(kind), fused=kind == "Q4_K")
    resident, streamed = load_model(path, dtype=dtype), load_model(path, dtype=dtype, stream=PLAN)
    np.testing.assert_array_equal(logits(streamed), logits(resident))
    streamed.unload()


@pytest.mark.parametrize("job_bytes", [5000, 1 << 20])
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0", "NVFP4", "IQ2_XXS"])
def test_an_expert_in_pieces(tmp_path, kind, job_bytes):
    """Pieces never cut a block, however small they are: the same bytes land in memory."""
    from mlx_qwen35.experts.slots import Slots

    source = open_source(written(tmp_path / "a.gguf", matrices(kind)))
    layout = expert_layouts(source)[1]
    start = "layers.1.mlp.experts."
    specs = {name.removeprefix(start): spec for name, spec in source.specs.items() if name.startswith(start)}
    slots = Slots(layout, specs, 2, mx.float32)
    with Reader({1: layout}, job_bytes=job_bytes, bounce=job_bytes == 5000) as reader:
        reads = [reader.submit(1, expert, slots.targets(slot)) for slot, expert in enumerate((4, 1))]
        reader.wait(reads)
    jobs = layout.jobs(0, job_bytes)
    assert (len(jobs) > 3) == (job_bytes == 5000)
    units = {tensor.made.unit for tensor in layout.tensors}
    assert all(piece.start % unit == 0 for job in jobs for chunk in job for piece in chunk.pieces for unit in units)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(slots.experts, projection)
        for kind_of in ("weight", "scales", "biases"):
            part = source.parts.get(f"{start}{projection}.{kind_of}")
            if part is None:
                continue
            whole = part.finish(part.fetch(), None)
            whole = whole.astype(mx.float32) if whole.dtype not in (mx.uint32, mx.uint8) else whole
            found = getattr(linear, kind_of)
            np.testing.assert_array_equal(np.array(found), np.array(whole)[[4, 1]])


def test_experts_with_one_factor_have_to_be_converted(tmp_path):
    def more(writer):
        writer.add_tensor("blk.0.ffn_up_exps.scale", np.ones(1, np.float32))

    source = open_source(written(tmp_path / "a.gguf", matrices("NVFP4"), more=more))
    with pytest.raises(CheckpointError, match="experts in GGUF cannot be streamed as they are. Convert"):
        expert_layouts(source)


def test_cuts_of_blocks():
    from mlx_qwen35.experts.layout import Chunk, Piece

    (chunk,) = [Chunk("a", 0, 0, (Piece(0, 0, 144 * 100), Piece(1, 0, 210 * 100)))]
    jobs = deal([chunk], 6000, (4176, 4200))
    found = [piece for job in jobs for part in job for piece in part.pieces]
    assert len(jobs) == 4 and sum(p.stop - p.start for p in found) == 35400
    assert all(p.start % (144 if p.tensor == 0 else 210) == 0 for p in found)
