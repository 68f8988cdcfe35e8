"""The engine where a GPU takes all rows' attention at once, on the emulator: rows join, leave, are cut and go on."""

import mlx.core as mx
import pytest

import mlx_qwen35.cache.rows as cache_rows
from mlx_qwen35.engine.answer import Answer
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.generation import generate_batch
from mlx_qwen35.kernels.backend import using
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session
from tests.metal_emulator import poisoned_outputs
from tests.talkers import PROMPT, Endless, random_model, recomputed

MODEL = random_model("dense")
MODEL.eval()


@pytest.fixture
def emulator(monkeypatch):
    monkeypatch.setattr(cache_rows, "TAIL", 4)
    with poisoned_outputs() as emulator:
        if emulator is None:
            pytest.skip("launches are counted in the emulator")
        yield emulator


def alone(prompt: list[int], count: int) -> list[int]:
    """As a CPU has it; the kernels agree with it within rounding, and no two logits of this model are that near."""
    with using(None):
        return recomputed(MODEL, prompt, count)


def launched(emulator, name: str = "ragged_attention") -> int:
    return sum(name in launch.name for launch in emulator.launches)


def test_a_batch_whose_rows_end_at_different_times(emulator):
    asked = [[*PROMPT[: 1 + 2 * number], 40 + number] for number in range(4)]
    done = generate_batch(MODEL, Endless(), asked, most_rows=3, max_tokens=7, sampling=Sampling())
    assert [list(each.tokens) for each in done] == [alone(prompt, 7) for prompt in asked]
    assert launched(emulator)


def test_rows_that_are_cut_leave_whole_caches(emulator):
    """A session goes on where its answer was cut, with the rest beside it going on undisturbed."""
    session, whole = Session(MODEL), alone(PROMPT, 40)  # before: what has no GPU has none in any thread
    with Engine(MODEL, Endless(), most_rows=3) as engine:
        cut: Answer = engine.submit(PROMPT, sampling=Sampling(), session=session)
        others = [engine.submit([*PROMPT, n], sampling=Sampling(), max_tokens=16) for n in (8, 9)]
        tokens = []
        for part in cut:
            if part.token is not None:
                tokens.append(part.token)
            if len(tokens) == 5:
                cut.cancel()
        assert tokens == whole[: len(tokens)]
        more = engine.submit([*PROMPT, *tokens, 13], sampling=Sampling(), max_tokens=6, session=session).result(60)
        assert more.cached_tokens >= len(PROMPT)
        found = [list(other.result(60).tokens) for other in others]
    assert list(more.tokens) == alone([*PROMPT, *tokens, 13], 6)
    assert found == [alone([*PROMPT, number], 16) for number in (8, 9)]
    assert launched(emulator)
    mx.synchronize()
