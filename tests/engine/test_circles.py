"""When an answer has ended nothing holds its cache any more, without a garbage collection: circles would."""

import gc
import time
import traceback

import pytest

from mlx_qwen35 import Engine, Sampling, generate, load, stream_generate
from mlx_qwen35.cache import Cache
from mlx_qwen35.engine.row import Row

SHORT = {"max_tokens": 6, "sampling": Sampling(), "enable_thinking": False}


@pytest.fixture(scope="module")
def demo():
    return load(mtp=True)


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(kind: type) -> int:
    return sum(type(each) is kind for each in gc.get_objects())


def fails(done: int, total: int) -> None:
    raise RuntimeError("the caller's own")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mtp": False},
        {"n": 2},
        {"logprobs": True},
        {"response_format": "json"},
        {"deadline": 0.001},
        {"on_progress": fails},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_an_engine_lets_go_of_its_rows(demo, uncollected, options):
    before = alive(Cache)
    with Engine(*demo) as engine:
        store = engine._worker.loop._store
        error = None
        for _ in range(2):
            try:
                engine.submit("What is 3 + 4?", **SHORT | options).result(60)
            except RuntimeError as raised:
                error = raised  # kept: it holds none of those that it was raised through
        assert (error is None) == ("on_progress" not in options)
        until = time.monotonic() + 10
        while (alive(Row) or alive(Cache) > before + len(store)) and time.monotonic() < until:
            time.sleep(0.01)
        assert alive(Row) == 0 and alive(Cache) == before + len(store)


def test_a_caller_of_the_loop_lets_go_of_it(demo, uncollected):
    before = alive(Cache)
    generate(*demo, "What is 3 + 4?", **SHORT)
    for _ in stream_generate(*demo, "What is 3 + 4?", **SHORT):
        break
    with pytest.raises(RuntimeError, match="the caller's own") as raised:
        generate(*demo, "What is 3 + 4?", on_progress=fails, **SHORT)
    del raised
    assert alive(Row) == 0 and alive(Cache) == before


def test_who_read_an_error_goes_on_though_it_ends_another_answer_too(demo):
    """Only what computed is cleared of what it held, and none of those who read."""
    failed = RuntimeError("the same each time")

    def fails(done: int, total: int) -> None:
        mine = "kept"  # noqa: F841
        raise failed

    def reading(engine: Engine):
        notes = ["begun"]
        try:
            engine.submit("What is 3 + 4?", on_progress=fails, **SHORT).result(60)
        except RuntimeError as error:
            notes.append(str(error))
            yield error
        yield notes

    with Engine(*demo) as engine:
        readers = [reading(engine) for _ in range(3)]
        errors = [next(reader) for reader in readers]
        assert errors == [failed] * 3
        until = time.monotonic() + 10
        while alive(Row) and time.monotonic() < until:
            time.sleep(0.01)
        assert [next(reader) for reader in readers] == [["begun", "the same each time"]] * 3
        frames = [frame for frame, _ in traceback.walk_tb(failed.__traceback__)]
        assert [frame.f_locals for frame in frames if frame.f_code is fails.__code__][-1]["mine"] == "kept"
