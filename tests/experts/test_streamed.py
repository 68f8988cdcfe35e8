"""A model whose experts come from the disk computes what the resident one computes, bit for bit."""

from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen35
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.engine.prefill import LONG, Left, Prefill
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.generation import prefill, stream_generate
from mlx_qwen35.library import demo_folder
from mlx_qwen35.model import Model
from mlx_qwen35.sampling import Sampling

from ..checkpoints import random_tensors, tiny_config, write_checkpoint

pytestmark = pytest.mark.usefixtures("guesses_always")

EXPERTS, CHOSEN, LAYERS = 12, 3, 5
SIZES = {
    "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 32, "hidden_size": 64,
    "shared_expert_intermediate_size": 32, "num_hidden_layers": LAYERS,
}  # fmt: skip
QUANTIZED = {
    "affine2": {"bits": 2, "group_size": 32}, "affine4": {"bits": 4, "group_size": 64},
    "affine5": {"bits": 5, "group_size": 32}, "affine8": {"bits": 8, "group_size": 64},
    "mxfp4": {"mode": "mxfp4"}, "mxfp8": {"mode": "mxfp8", "bits": 8}, "nvfp4": {"mode": "nvfp4"},
}  # fmt: skip
PLAN = StreamPlan(slots=(5,) * LAYERS, group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)


def plan(slots: int, **changes) -> StreamPlan:
    return replace(PLAN, slots=(slots,) * LAYERS, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same random model in every form that can be streamed."""
    config = tiny_config("moe", **SIZES)
    made = {}
    for name, layout, dtype in [
        ("hf", "hf", "float32"), ("hf-per-expert", "hf-per-expert", "bfloat16"), ("hf16", "hf", "float16"),
        ("mlx", "mlx", "bfloat16"),
    ]:  # fmt: skip
        made[name] = tmp_path_factory.mktemp(name)
        write_checkpoint(made[name], config, random_tensors(config), layout=layout, dtype=dtype)
    for name, options in QUANTIZED.items():
        made[name] = tmp_path_factory.mktemp(name) / "converted"
        convert(made["hf"], made[name], recipe="uniform", **options)
    made["packed"] = tmp_path_factory.mktemp("packed") / "converted"
    convert(made["hf16"], made["packed"], recipe="uniform", pack_experts=True)
    return made


FORMS = ["hf", "hf-per-expert", "hf16", "mlx", "packed", *QUANTIZED]


def step_by_step(model: Model, tokens: list[int]) -> np.ndarray:
    cache = model.make_cache()
    return np.concatenate([np.array(model(mx.array([[token]]), cache)[0]) for token in tokens])


def some_tokens(length: int, seed: int = 1) -> list[int]:
    return np.random.RandomState(seed).randint(0, 80, length).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_decoding_gives_the_same_bits(folders, form):
    resident, tokens = load_model(folders[form]), some_tokens(40)
    expected = step_by_step(resident, tokens)
    for slots in (CHOSEN, 7, EXPERTS - 1):
        streamed = load_model(folders[form], stream=plan(slots))
        np.testing.assert_array_equal(step_by_step(streamed, tokens), expected)
        stats = streamed.expert_stats
        assert stats.hits + stats.misses == len(tokens) * LAYERS * CHOSEN and stats.misses > 0
        streamed.unload()


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_gives_the_same_bits(folders, form):
    resident, tokens = load_model(folders[form]), some_tokens(131)
    plans = [(CHOSEN, 1, 200), (5, 2, 64), (EXPERTS - 1, 5, 50), (5, 30, 131)]
    for slots, group, chunk in plans if form in ("hf", "affine4", "mxfp4") else plans[:2]:
        streamed = load_model(folders[form], stream=plan(slots, group=group, chunk=chunk, tile=chunk))
        caches = resident.make_cache(), streamed.make_cache()
        expected = prefill(resident, tokens, caches[0], chunk_size=chunk)
        np.testing.assert_array_equal(np.array(prefill(streamed, tokens, caches[1])), np.array(expected))
        for token in some_tokens(5, seed=2):
            expected, found = (m(mx.array([[token]]), c) for m, c in zip((resident, streamed), caches, strict=True))
            np.testing.assert_array_equal(np.array(found), np.array(expected))


@pytest.mark.parametrize("tile", [64, 300])
def test_a_piece_that_is_left_between_layers_was_never_begun(folders, tile):
    resident, tokens = load_model(folders["affine4"]), some_tokens(LONG + 40)
    streamed = load_model(folders["affine4"], stream=plan(5, chunk=1000, tile=tile))
    looks: list[bool] = []
    cache = streamed.make_cache()
    reading = Prefill(streamed, tokens, cache, leaves=lambda: looks.append(True) or len(looks) == 3)
    with pytest.raises(Left):
        reading.piece()
    assert cache.offset == reading.done == 0 and len(looks) == 3
    expected = prefill(resident, tokens, resident.make_cache())
    np.testing.assert_allclose(np.array(reading.piece()), np.array(expected), atol=1e-3)
    assert len(looks) == 3 + LAYERS


@pytest.mark.parametrize("length, tile", [(40, 16), (131, 50), (131, 1), (200, 64)])
def test_tiles_give_what_the_whole_gives(folders, length, tile):
    """But for rounding: a delta net's sums are cut where tiles are."""
    resident, tokens = load_model(folders["affine8"]), some_tokens(length)
    streamed = load_model(folders["affine8"], stream=plan(5, chunk=1000, tile=tile))
    expected = prefill(resident, tokens, resident.make_cache())
    cache = streamed.make_cache()
    np.testing.assert_allclose(np.array(prefill(streamed, tokens, cache)), np.array(expected), atol=1e-3)
    whole = np.array(streamed(mx.array([tokens])))[0]  # and without a cache
    np.testing.assert_allclose(whole, np.array(resident(mx.array([tokens])))[0], atol=1e-3)


@pytest.mark.parametrize("slots", [CHOSEN, 5, EXPERTS - 1])
@pytest.mark.parametrize("rows", [2, 7, 21, 22, 40])
def test_batches_give_the_same_bits(folders, rows, slots):
    """Around the number of rows where the form of the product changes, and with unions that do not fit."""
    resident, streamed = load_model(folders["affine4"]), load_model(folders["affine4"], stream=plan(slots))
    padding = [row % 3 for row in range(rows)]
    caches = [model.make_cache(rows, left_padding=padding) for model in (resident, streamed)]
    rng = np.random.RandomState(rows)
    for _ in range(6):
        tokens = mx.array(rng.randint(0, 80, (rows, 1 + (rows == 7))))
        expected, found = (m(tokens, c) for m, c in zip((resident, streamed), caches, strict=True))
        np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_a_padded_batch_in_chunks_of_several_tiles(folders):
    """What each tile may read begins with the padding, and with what earlier chunks have left."""
    resident, streamed = load_model(folders["affine4"]), load_model(folders["affine4"], stream=plan(5, tile=16))
    tokens = np.random.RandomState(4).randint(0, 80, (3, 90))
    caches = [model.make_cache(3, left_padding=[0, 21, 5]) for model in (resident, streamed)]
    for start, stop in [(0, 40), (40, 90)]:
        expected, found = (
            np.array(m(mx.array(tokens[:, start:stop]), c)) for m, c in zip((resident, streamed), caches, strict=True)
        )
        real = np.arange(start, stop) >= np.array([0, 21, 5])[:, None]
        np.testing.assert_allclose(found[real], expected[real], atol=1e-3)


def test_a_prompt_keeps_its_slots_for_its_end(folders):
    """While more of it follows nobody has to leave; its last chunk leaves the experts that it asked for last."""
    model = load_model(folders["affine4"], stream=plan(4))
    banks = [layer.mlp.experts for layer in model.layers]

    def held():
        return [set(bank.residency.slot_of) for bank in banks]

    cache = model.make_cache()
    mx.eval(model.hidden(mx.array([some_tokens(40)]), cache, more=True))
    first = held()
    assert all(len(each) == 4 for each in first)
    mx.eval(model.hidden(mx.array([some_tokens(40, seed=2)]), cache, more=True))
    assert held() == first
    asked = []
    for bank in banks:
        many = bank._many
        bank._many = lambda x, ids, beside, many=many: asked.append(ids) or many(x, ids, beside)
    mx.eval(model.hidden(mx.array([some_tokens(40, seed=3)]), cache))
    for ids, each in zip(asked, held(), strict=True):
        assert set(ids[-1].tolist()) <= each


def test_layers_may_have_unequal_slots_and_be_resident(folders):
    slots = (EXPERTS, 3, 7, EXPERTS, 4)
    resident, streamed = load_model(folders["affine4"]), load_model(folders["affine4"], stream=plan(5))
    mixed = load_model(folders["affine4"], stream=replace(PLAN, slots=slots))
    tokens = some_tokens(30)
    expected = step_by_step(resident, tokens)
    for model in (streamed, mixed):
        np.testing.assert_array_equal(step_by_step(model, tokens), expected)
    assert mixed.expert_stats.hits + mixed.expert_stats.misses == 30 * 3 * CHOSEN


def test_bytes_read_are_misses_times_the_record(folders):
    model = load_model(folders["affine4"], stream=plan(4))
    model._pool.prefetch = False
    step_by_step(model, some_tokens(50))
    stats = model.expert_stats
    # Scales and biases in float32 for groups of 64, but of 32 in down_proj, whose rows are no longer than that.
    record = 64 * 32 * (2 * (4 / 8 + 2 * 4 / 64) + (4 / 8 + 2 * 4 / 32))
    assert stats.bytes_read == stats.misses * record and stats.records == stats.misses > 0


def test_what_is_prefetched_is_read_once(folders):
    model = load_model(folders["affine4"], stream=plan(8))
    step_by_step(model, some_tokens(50))
    stats = model.expert_stats
    assert stats.prefetch_hits > 0
    assert stats.misses <= stats.records <= stats.misses + stats.prefetched


def test_guesses_that_come_and_go_change_no_bit(folders, monkeypatch):
    expected = step_by_step(load_model(folders["affine4"]), some_tokens(40))
    streamed, turns = load_model(folders["affine4"], stream=plan(5)), iter(np.random.RandomState(3).rand(1000) < 0.5)
    monkeypatch.setattr(streamed._pool.guessing, "pays", lambda: bool(next(turns)))
    np.testing.assert_array_equal(step_by_step(streamed, some_tokens(40)), expected)


def test_guesses_are_told_what_happened(folders, monkeypatch):
    """As many as were read, as came true, as were waited for; without guesses all that is missing is waited for."""
    model = load_model(folders["affine4"], stream=plan(6))
    told = dict.fromkeys(("made", "came_true", "waited", "copied"), 0)
    for name in told:
        def count(*given, name=name):
            told[name] += given[-1]
        monkeypatch.setattr(model._pool.guessing, name, count)
    step_by_step(model, some_tokens(30))
    stats = model.expert_stats
    assert told["came_true"] == stats.prefetch_hits > 0
    assert told["copied"] == stats.records and told["copied"] >= told["made"] > told["came_true"]
    model._pool.prefetch, before = False, dict(told)
    step_by_step(model, some_tokens(30))
    assert told["made"] == before["made"]
    assert told["waited"] - before["waited"] == (model.expert_stats - stats).misses > 0


def test_every_expert_fits_and_nothing_is_read_twice(folders):
    model = load_model(folders["affine4"], stream=plan(EXPERTS - 1))
    first = model.expert_stats
    prefill(model, some_tokens(60), model.make_cache())
    assert (model.expert_stats - first).records <= EXPERTS * LAYERS


def test_the_end_of_a_prompt_stays(folders):
    """What the last tokens of a prompt asked for is in memory after it: the same tokens again miss less."""
    misses = []
    for warm in (False, True):
        model = load_model(folders["affine4"], stream=plan(6))
        model._pool.prefetch = False
        if warm:
            prefill(model, some_tokens(64), model.make_cache())
        before = model.expert_stats
        model(mx.array([[some_tokens(64)[-1]]]))
        misses.append((model.expert_stats - before).misses)
    assert misses[1] < misses[0] == LAYERS * CHOSEN


def test_lazy_results_are_not_overwritten(folders):
    """Logits that nobody has looked at yet keep their values while slots change hands."""
    model, tokens = load_model(folders["affine4"], stream=plan(CHOSEN)), some_tokens(20)
    expected = [np.array(model(mx.array([[token]]))) for token in tokens]
    lazy = [model(mx.array([[token]])) for token in tokens]
    for found, right in zip(reversed(lazy), reversed(expected), strict=True):
        np.testing.assert_array_equal(np.array(found), right)


def test_threads_take_turns(folders):
    model, found = load_model(folders["affine4"], stream=plan(4)), {}
    jobs = {seed: some_tokens(25, seed) for seed in range(3)}
    expected = {seed: step_by_step(model, tokens) for seed, tokens in jobs.items()}

    def work(seed: int) -> None:
        found[seed] = step_by_step(model, jobs[seed])

    threads = [Thread(target=work, args=(seed,)) for seed in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, right in expected.items():
        np.testing.assert_array_equal(found[seed], right)


def demo_plan(slots: int) -> StreamPlan:
    layers = ModelConfig.from_folder(demo_folder()).text.num_hidden_layers
    return replace(PLAN, slots=(slots,) * layers)


@pytest.mark.parametrize("slots", [4, 6, 11])
def test_the_demo_gives_the_same_answers(slots):
    resident, processor = mlx_qwen35.load()
    streamed = load_model(demo_folder(), stream=demo_plan(slots))
    for prompt in ("Sort: dog, cat, ant", "What is 12 + 30?"):
        answers = []
        for model in (resident, streamed):
            parts = list(stream_generate(model, processor, prompt, max_tokens=150, sampling=Sampling(temperature=0)))
            answers.append(([part.token for part in parts], np.array(parts[-1].logprobs)))
        assert answers[0][0] == answers[1][0]
        np.testing.assert_array_equal(answers[0][1], answers[1][1])


def test_cancelled_answers_leave_a_cache_that_goes_on():
    resident, processor = mlx_qwen35.load()
    streamed = load_model(demo_folder(), stream=demo_plan(5))
    for stop_after in (1, 2, 7):
        caches = []
        for model in (resident, streamed):
            cache, stop = model.make_cache(), Event()
            answer = stream_generate(
                model, processor, "Sort: dog, cat, ant", cache=cache, cancel=stop, sampling=Sampling(temperature=0)
            )
            for count, _ in enumerate(answer, 1):
                if count == stop_after:
                    stop.set()
            caches.append(cache)
        assert caches[0].offset == caches[1].offset
        following = [np.array(m(mx.array([[5, 6]]), c)) for m, c in zip((resident, streamed), caches, strict=True)]
        np.testing.assert_array_equal(*following)


def test_unloading_gives_files_and_threads_back(folders):
    model = load_model(folders["affine4"], stream=plan(4))
    model(mx.array([[1, 2]]))
    model.unload()
    with pytest.raises(mlx_qwen35.Qwen35Error, match="load it again"):
        model(mx.array([[1]]))


def test_plans_that_make_no_sense_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="needs 3"):
        load_model(folders["affine4"], stream=plan(2))
    with pytest.raises(ValueError, match="4 layers"):
        load_model(folders["affine4"], stream=replace(PLAN, slots=(5,) * 4))
    config = tiny_config("dense")
    write_checkpoint(tmp_path / "dense", config, random_tensors(config))
    with pytest.raises(CheckpointError, match="no experts"):
        load_model(tmp_path / "dense", stream=plan(5))
