"""A long piece of a prompt is left between layers, and then it was never begun."""

import pytest

from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.engine.prefill import LONG, Left, Prefill
from mlx_qwen35.engine.scheduler import Scheduler
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session
from mlx_qwen35.session.store import Store
from tests.talkers import Endless, random_model, recomputed

MODELS = {kind: random_model(kind) for kind in ("dense", "moe")}
PROMPT = [number * 7 % 90 for number in range(LONG + 90)]


class Looks:
    """True from the look of this number on."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count >= self.number


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("number", [1, 2, 99])
def test_what_is_left_was_never_begun(kind, number):
    model, looks = MODELS[kind], Looks(number)
    layers, expected = len(model.layers), 0
    cache = model.make_cache()
    reading = Prefill(model, PROMPT, cache, leaves=looks)
    reading.begin()
    assert reading.piece(20) is None and looks.count == 0  # too short to be worth it
    if number <= layers:
        with pytest.raises(Left):
            reading.piece()
        assert (looks.count, reading.done, cache.offset) == (number, 20, 20)
        expected, looks.number = number, 1 << 30
    logits = reading.piece()
    assert (looks.count, cache.offset) == (expected + layers, len(PROMPT))
    whole = Prefill(model, PROMPT, model.make_cache())
    whole.piece(20)
    assert (logits == whole.piece()).all().item()


@pytest.mark.parametrize("own", [False, True])
def test_a_row_that_is_cancelled_inside_a_piece(own):
    """Ends at once with what was computed before; the others have what they have alone."""
    model = MODELS["dense"]
    store = Store(model, most_bytes=1 << 28)
    scheduler = Scheduler(most_rows=2, cache_bytes=1 << 28, chunk=LONG)
    loop, looks, session = Loop(model, store=store, scheduler=scheduler), Looks(1 << 30), Session(model)
    options = {"sampling": Sampling(), "max_tokens": 4}
    prompt = [*PROMPT, *PROMPT]
    more = {"session": session} if own else {}
    row = loop.add(requests.read(model, Endless(), prompt, {**options, **more, "cancel": looks}))
    while row.prefill is None or row.prefill.done < LONG:
        loop.turn()
    done, other = row.prefill.done, loop.add(requests.read(model, Endless(), prompt[:50], options))
    looks.number = looks.count + 3  # one in the turn, and two between layers
    loop.turn()
    assert row.take().finish_reason == "cancelled" and looks.count == looks.number
    assert not own or session.tokens == prompt[:done]
    tokens = []
    while len(tokens) < 4:
        loop.turn()
        tokens += [other.take().token for _ in other.pending.copy()]
    assert tokens == recomputed(model, prompt[:50], 4)
