"""exact=True: a row has the bits that it has alone, slots those of all experts; and which calls of MLX that rests on.

MLX chooses a product's kernel on Metal by the rows that meet a matrix, and of a sorted gathered one by rows for each
expert of the stack. No test here runs there. What a GPU would be asked is run on the CPU, and each call looked at.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model as read_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.experts import pool
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.kernels import gated_delta as rule
from mlx_qwen35.kernels import one_row
from mlx_qwen35.library import demo_folder, load, load_model
from mlx_qwen35.model import Model
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.drafted import always, near
from tests.speculative.test_few_tokens import quantized
from tests.talkers import greedy, random_model

FORMS = [
    {"group_size": 64, "bits": 4, "mode": "affine"}, {"group_size": 32, "bits": 3, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"}, {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]  # fmt: skip
MODELS = {
    "dense": lambda: random_model("dense"),
    "moe": lambda: random_model("moe"),
    "4 bits": lambda: quantized(group_size=32, bits=4),
    "mxfp8": lambda: quantized(group_size=32, bits=8, mode="mxfp8"),
}
EXPERTS, CHOSEN, LAYERS = 16, 8, 4  # 8 rows make 64 pairs
SIZES = {
    "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 32, "hidden_size": 64,
    "shared_expert_intermediate_size": 32, "num_hidden_layers": LAYERS,
}  # fmt: skip
PLAN = StreamPlan(slots=(9,) * LAYERS, group=2, chunk=512, tile=512, cache_limit=1 << 24, memory=1 << 30)


@dataclass
class Call:
    """Of a product: its name, the shapes of rows and of matrices, and whether MLX may go by sorted ids."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    sorted: bool


@pytest.fixture
def calls(monkeypatch) -> list[Call]:
    """The products that MLX is asked for where it names a GPU as its device; they are computed on the CPU."""
    made: list[Call] = []

    def noted(name):
        real = getattr(mx, name)

        def call(x, weight, *args, **how):
            made.append(Call(name, x.shape, weight.shape, bool(how.get("sorted_indices"))))
            return real(x, weight, *args, **how)

        return call

    for name in ("quantized_matmul", "gather_qmm", "gather_mm"):
        monkeypatch.setattr(mx, name, noted(name))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(pool, "has_metal", lambda: True)
    return made


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def device(request) -> None:
    if request.param == "as on a GPU":
        request.getfixturevalue("calls")


def exact(model: Model) -> Model:
    model.be_exact()
    return model


def tokens(*shape: int) -> mx.array:
    return mx.array(np.random.RandomState(sum(shape)).randint(0, 80, shape))


def normal(*shape: int) -> mx.array:
    return mx.array(np.random.RandomState(len(shape)).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("form", [None, *FORMS], ids=str)
def test_a_product_gives_each_of_eight_rows_its_own_bits(device, form):
    x, weight = normal(2, 4, 192), normal(40, 192) / 14
    if form is None:
        product, expected = (lambda rows: one_row.matmul(rows, weight)), x @ weight.T
    else:
        packed, *scales = mx.quantize(weight, **form)
        parts = packed, scales[0], (scales[1] if len(scales) > 1 else None)
        product = lambda rows: one_row.quantized_matmul(rows, *parts, **form)  # noqa: E731
        expected = x @ mx.dequantize(*parts, **form).T
    together = product(x)
    assert together.shape == expected.shape and mx.allclose(together, expected, atol=1e-4)
    for batch in range(2):
        for row in range(4):
            assert mx.array_equal(product(x[batch, row]), together[batch, row])
    many = normal(3, 3, 192)
    assert product(many).shape == (3, 3, 40)


def test_on_a_gpu_every_product_is_of_one_row_and_by_one_call(calls):
    """What MLX joins where a matrix is one for all rows stays apart, and a row alone takes the very same call."""
    for name, make in MODELS.items():
        model = exact(make())
        for length in (1, 4, 8):
            cache = model.make_cache()
            calls.clear()
            with cache.each_step():
                mx.eval(model(tokens(1, length), cache))
            assert {call.name for call in calls} <= {"gather_qmm", "gather_mm"} and calls, name
            assert all(call.x[-2] == 1 and not call.sorted for call in calls), name
        calls.clear()
        mx.eval(make()(tokens(1, 4)))
        if name in ("4 bits", "mxfp8"):
            assert any(call.name == "quantized_matmul" and call.x[-2] == 4 for call in calls)


@pytest.mark.parametrize("kind", MODELS)
def test_up_to_eight_tokens_and_eight_sequences_are_each_alone(device, kind):
    model, given = exact(MODELS[kind]()), tokens(8, 8)
    cache = model.make_cache()
    with cache.each_step():
        together = np.array(model(given[:1], cache))
    alone = model.make_cache()
    for at in range(8):
        assert np.array_equal(np.array(model(given[:1, at : at + 1], alone)), together[:, at : at + 1])
    cache = model.make_cache(8)
    steps = [np.array(model(given[:, at : at + 1], cache)) for at in range(3)]
    for row in (0, 5, 7):
        alone = model.make_cache()
        for at, step in enumerate(steps):
            assert np.array_equal(np.array(model(given[row : row + 1, at : at + 1], alone)), step[row : row + 1])


@pytest.mark.parametrize("kind", ["4 bits", "mxfp8"])
def test_drafts_change_no_token(device, monkeypatch, kind):
    model = exact(MODELS[kind]())
    plain = [part.token for part in greedy(model, max_tokens=12)]
    always(monkeypatch, 3)
    drafted = list(greedy(model, max_tokens=12, draft_model=near("moe", 0.02), num_draft_tokens=3))
    assert [part.token for part in drafted] == plain and drafted[-1].drafted_tokens > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    config = tiny_config("moe", **SIZES)
    made = {"float32": tmp_path_factory.mktemp("float32")}
    write_checkpoint(made["float32"], config, random_tensors(config), layout="hf", dtype="float32")
    for name, how in {"affine": {"bits": 4, "group_size": 32}, "nvfp4": {"mode": "nvfp4"}}.items():
        made[name] = tmp_path_factory.mktemp(name) / "converted"
        convert(made["float32"], made[name], recipe="uniform", **how)
    return made


@pytest.mark.parametrize("form", ["float32", "affine", "nvfp4"])
def test_slots_give_the_bits_of_all_experts_for_any_number_of_rows(folders, device, form):
    resident = exact(read_model(folders[form], dtype="float32"))
    streamed = exact(read_model(folders[form], dtype="float32", stream=PLAN))
    for shape in [(1, 1), (1, 5), (8, 1), (9, 1), (1, 12), (3, 70)]:
        given, caches = tokens(*shape), (resident.make_cache(shape[0]), streamed.make_cache(shape[0]))
        for _ in range(2):
            expected, found = (model(given, cache) for model, cache in zip((resident, streamed), caches, strict=True))
            assert np.array_equal(np.array(expected), np.array(found)), shape
    streamed.unload()


def test_no_product_of_experts_asks_how_large_their_stack_is(folders, calls):
    """A sorted gathered product is not there; of many rows each expert's matrix is multiplied by itself."""
    for options in ({}, {"stream": PLAN}):
        for shape in [(9, 1), (1, 12), (1, 100)]:
            model = exact(read_model(folders["affine"], dtype="float32", **options))
            calls.clear()
            mx.eval(model(tokens(*shape)))
            assert not any(call.sorted for call in calls)
            assert all(call.x[-2] == 1 for call in calls if call.name == "gather_qmm")
            assert all(len(call.weight) == 2 for call in calls if call.name == "quantized_matmul")
            model.unload()
    calls.clear()
    mx.eval(read_model(folders["affine"], dtype="float32")(tokens(1, 12)))
    assert any(call.sorted for call in calls)


def test_the_rule_is_not_mlx_s_own_form_on_a_gpu(monkeypatch):
    """Padded rows and prompts where the kernel is missing; the form of MLX is relaxed on M5."""
    taken = []
    monkeypatch.setattr(rule, "_ON_GPU", True)
    monkeypatch.setattr(rule, "has_own_form", lambda *a: True)
    own = rule._OWN
    monkeypatch.setattr(rule, "_OWN", lambda *a: taken.append(a) or own(*a))
    model, given = random_model("dense"), tokens(2, 5)
    expected = np.array(model(given, model.make_cache(2, left_padding=[1, 0])))
    assert taken
    taken.clear()
    found = np.array(exact(model)(given, model.make_cache(2, left_padding=[1, 0])))
    assert not taken and np.abs(found - expected).max() < 1e-4


def test_it_is_asked_for_at_load(tmp_path):
    model, _ = load(exact=True)
    assert model.exact and load_model(demo_folder(), exact=True).exact and not load_model(demo_folder()).exact
    with pytest.raises(ArgumentError, match="merge it first"):
        load(exact=True, adapter_path=tmp_path)
