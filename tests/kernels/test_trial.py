"""Kernels check themselves: what is found of a faulty one, what then does its work, and what is remembered.

On the emulator as a pretended GPU; faults are planted in the text or in what a launch returns.
"""

import dataclasses
import json
import re
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_qwen35
from benchmarks import geometry
from mlx_qwen35 import kernels
from mlx_qwen35.cache import KVCache
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.kernels import (
    add_norm,
    angles,
    attention_inputs,
    delta_decode,
    expert_down,
    expert_gate_up,
    norm_matmul,
    ragged_attention,
    router,
    verdicts,
)
from mlx_qwen35.kernels.backend import FOLDER, Backend, using
from mlx_qwen35.layers.trials import uses
from mlx_qwen35.library.kernel_check import KernelWarning, check_kernels
from mlx_qwen35.model import Model
from tests.metal_emulator import poisoned_outputs
from tests.tiny_model import tiny_model

OF_ROWS = {"ragged_attention", "ragged_sum"}
NAMES = {"add_norm", "angles", "norm_matmul", "attention_inputs", "delta_decode", "router"} | OF_ROWS
NAMES |= {"expert_gate_up", "expert_down"}
TOKENS = mx.array([[3, 1, 4, 1, 5, 9]])


def model_of(kind="moe", joined=True, **overrides):
    sizes = {"hidden_size": 64, "head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 4,
             "rope_parameters": {"mrope_section": [3, 3, 2]}}  # fmt: skip
    ffn = {"intermediate_size": 96}
    if kind == "moe":
        ffn = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}
    model = tiny_model(kind, **sizes | ffn | overrides)[0]
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, module: hasattr(module, "to_quantized"))
    model.eval()
    if joined:
        model.join()
    return model


@pytest.fixture(scope="module")
def emulator():
    with poisoned_outputs() as emulator:
        if emulator is None:
            pytest.skip("faults are planted in the emulator")
        yield emulator


def logits(model):
    cache = model.make_cache()
    made = [np.array(model(TOKENS[:, a:b], cache))[0] for a, b in [(0, 1), (1, 4), (4, 6)]]
    return np.concatenate([*made, *of_rows(model, cache)])


def of_rows(model, cache):
    """Two rows side by side, then with a third whose past is long (what it holds was never computed)."""
    short, long = model.make_cache(), model.make_cache()
    for other in (short, long):
        model(TOKENS[:, :3], other)
    for number, layer in enumerate(long.layers):
        if isinstance(layer, KVCache):
            shapes = [(*array.shape[:2], 600, array.shape[3]) for array in layer.arrays()]
            layer.update(*(normal(shape, 2 * number + second) for second, shape in enumerate(shapes)))
    long.offset += 600
    rows, made = RowsCache([cache, short]), []
    for more in ([], [long]):
        rows.join(more)
        made += list(np.array(model.head(model.hidden(mx.full((len(rows), 1), 7), rows))))
    return made


def normal(shape, seed):
    return mx.array(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def planted(monkeypatch, tmp_path, operation, old, new):
    kernel = operation._KERNEL
    text = (FOLDER / kernel.body).read_text()
    assert old in text
    (tmp_path / "changed.metal").write_text(text.replace(old, new, 1))
    changed = dataclasses.replace(kernel, body=str(tmp_path / "changed.metal"), _made={})
    monkeypatch.setattr(operation, "_KERNEL", changed)


def names_of(emulator, since):
    return {launch.name.removeprefix("custom_kernel_").split("__")[0] for launch in emulator.launches[since:]}


def test_what_is_right_is_taken_and_asked_once(emulator, tmp_path):
    model, file = model_of(), tmp_path / "cache" / "kernels.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check_kernels(model, file=file)
        assert found == dict.fromkeys(NAMES)
        assert kernels.verdicts.checked(file) == found
        count = len(emulator.launches)
        assert check_kernels(model_of(), file=file) == found
    assert len(emulator.launches) == count
    logits(model)
    assert NAMES <= {*names_of(emulator, count)}
    assert [path.name for path in file.parent.iterdir()] == ["kernels.json"]


def test_each_kind_of_call_is_tried_as_the_model_makes_it(emulator, tmp_path):
    """The texts that a model launches are those that were tried: sizes, forms, columns of joined products."""
    for joined in (True, False):
        model, start = model_of(joined=joined), len(emulator.launches)
        check_kernels(model, file=tmp_path / f"{joined}.json")
        tried = {launch.name for launch in emulator.launches[start:]}
        start = len(emulator.launches)
        logits(model)
        mx.eval(model(TOKENS.reshape(2, 3), model.make_cache(2, left_padding=[0, 2])))
        made = {launch.name for launch in emulator.launches[start:]}
        # Two rows of three experts lie between what is tried: 6 ids, and 8 weights.
        assert {re.sub("(float|u?int32_t)c", r"\1", name) for name in made - tried} <= tried


FAULTS = {
    "does not compile": (add_norm, "float squares = 0.0f;", "float squares = missing;"),
    "one wrong value": (attention_inputs, "const T result = static_cast<T>(value * scale);",
                        "const T result = static_cast<T>(value * scale + (number == 3 && i == 1 ? 0.5f : 0.0f));"),
    "the other axis": (angles, "axes[pair]", "(axes[pair] == 1 ? 2 : axes[pair])"),
    "one row only": (norm_matmul, "simd_sum(gates[n][r]) * scale",
                     "simd_sum(gates[n][r]) * scale * (MANY == 1 ? 1.1f : 1.0f)"),
    "NaN": (delta_decode, "made[i] * scale", "(mine == 5 ? as_type<float>(0x7fc00000u) : made[i]) * scale"),
    "not written": (expert_down, "first + r < H) {", "first + r + 1 < H) {"),
    "behind its output": (add_norm, "total[start + i] =",
                          "total[start + (i == 0 ? 3 * H + 1 : 0)] = 0, total[start + i] ="),
    "one wrong span": (ragged_attention, "sum += shown[s * D + column];",
                       "sum += shown[s * D + column] * (item == 1 ? 1.1f : 1.0f);"),
    "other experts": (router, "ids[row * K + lane] = my_id;", "ids[row * K + lane] = my_id ^ (row == 1);"),
    "odd sizes only": (expert_gate_up, "float h = g /", "float h = (I % 64 == 32 ? 1.1f : 1.0f) * g /"),
}  # fmt: skip


SELDOM = [pytest.param(fault, marks=pytest.mark.soak) for fault in [*FAULTS][1::2]]


@pytest.mark.parametrize("fault", [*[*FAULTS][::2], *SELDOM])
def test_a_faulty_kernel_is_switched_off_named_and_remembered(emulator, fault, monkeypatch, tmp_path):
    operation, old, new = FAULTS[fault]
    name, file = operation._KERNEL.name, tmp_path / "kernels.json"
    with using(None):
        expected = logits(model_of())
    planted(monkeypatch, tmp_path, operation, old, new)
    model = model_of()
    with pytest.warns(KernelWarning, match=f"{name}: ") as caught:
        found = check_kernels(model, file=file)
    assert len(caught) == 1
    assert {other for other, why in found.items() if why} == {name} and set(found) == NAMES
    start = len(emulator.launches)
    np.testing.assert_allclose(logits(model), expected, atol=2e-3)
    launched = names_of(emulator, start)
    assert name not in launched and launched
    assert (set(FAULTS[fault][:1]) & {router, expert_gate_up, expert_down} != set()) == ("router" not in launched)
    # The next start asks nothing and does the same; another version asks again.
    start = len(emulator.launches)
    again = model_of()
    with pytest.warns(KernelWarning, match=name):
        assert check_kernels(again, file=file) == found
    assert len(emulator.launches) == start
    assert {other for other, why in verdicts.checked(file).items() if why} == {name}
    monkeypatch.setattr(mlx_qwen35, "__version__", "9.9")
    with pytest.warns(KernelWarning, match=name):
        check_kernels(again, file=file)
    assert len(emulator.launches) > start


def test_only_the_sizes_that_fail_are_switched_off(emulator, monkeypatch, tmp_path):
    planted(monkeypatch, tmp_path, add_norm, "sums[n] * scale", "sums[n] * scale * (H == 64 ? 2.0f : 1.0f)")
    narrow, wide = model_of("dense"), tiny_model("dense", hidden_size=96)[0]
    with pytest.warns(KernelWarning):
        check_kernels(narrow, file=tmp_path / "kernels.json")
    assert all(layer.post_attention_layernorm.unfused for layer in narrow.layers)
    assert check_kernels(wide, file=tmp_path / "kernels.json")["add_norm"] is None
    assert not any(layer.post_attention_layernorm.unfused for layer in wide.layers)


def refusing(backend, name, most):
    """A backend whose pipelines of one kernel allow fewer threads, as Metal says it: when the launch is evaluated."""

    def make(**parts):
        made = backend.make(**parts)

        def call(**how):
            count = how["threadgroup"][0]
            if parts["name"] == name and count > most:
                raise ValueError(f"Thread group size ({count}) is greater than  the maximum allowed ({most}).")
            return made(**how)

        return call

    return Backend("emulator", make)


def test_fewer_simd_groups_where_a_pipeline_allows_fewer_threads(emulator, tmp_path):
    sizes = {"linear_value_head_dim": 64}
    model = model_of("dense", **sizes)
    with using(None):
        expected = logits(model)
    with using(refusing(emulator.backend, "delta_decode", 300)), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_kernels(model, file=tmp_path / "kernels.json")["delta_decode"] is None
        nets = [layer.linear_attn for layer in model.layers if not layer.is_attention]
        assert nets and all(net.most_simds == 8 and not net.unfused for net in nets)
        np.testing.assert_allclose(logits(model), expected, atol=2e-3)
    with using(refusing(emulator.backend, "delta_decode", 100)), pytest.warns(KernelWarning, match="Thread group size"):
        check_kernels(model, file=tmp_path / "other.json")
        assert all(net.unfused for net in nets)


def test_switched_off_by_hand(emulator, tmp_path):
    model, start = model_of(), len(emulator.launches)
    assert check_kernels(model, wanted=False, file=tmp_path / "kernels.json") == {}
    model(TOKENS)
    assert len(emulator.launches) == start and not (tmp_path / "kernels.json").exists()


def test_load_checks_and_forgets_nothing(emulator, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = len(emulator.launches)
    model, _ = mlx_qwen35.load(mtp=True)
    assert NAMES <= names_of(emulator, start) and set(kernels.checked()) == NAMES
    assert all(why is None for why in kernels.checked().values())
    assert not any(use.module.unfused for part in (model, model.mtp) for use in uses(part))
    start = len(emulator.launches)
    model, _ = mlx_qwen35.load(mtp=True, kernels=False)
    assert len(emulator.launches) == start
    assert all(use.module.unfused for part in (model, model.mtp) for use in uses(part))


def test_nothing_is_asked_where_there_is_no_gpu(tmp_path):
    with using(None):
        assert check_kernels(model_of("dense"), file=tmp_path / "kernels.json") == {} == kernels.checked()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"format": 3}', b'{"format": "mlx-qwen35 kernels 1"}',
    b'{"format": "mlx-qwen35 kernels 1", "verdicts": {"x": [1]}}',
    b'{"format": "mlx-qwen35 kernels 1", "verdicts": {"x": {"y": 5}}}', b"[" * 100_000,
])  # fmt: skip
def test_a_damaged_or_foreign_file_counts_as_none(tmp_path, content):
    file = tmp_path / "kernels.json"
    file.write_bytes(content)
    assert verdicts.read(file, "x") == {}
    verdicts.remember(file, "x", {"a b": None, "c d": "wrong"})
    assert verdicts.read(file, "x") == {"a b": None, "c d": "wrong"}


def test_machines_and_versions_are_kept_apart_and_not_for_ever(tmp_path):
    file = tmp_path / "kernels.json"
    for number in range(20):
        verdicts.remember(file, f"machine {number}", {"a": None})
    verdicts.remember(file, "machine 19", {"b": "wrong"})
    assert verdicts.read(file, "machine 19") == {"a": None, "b": "wrong"}
    assert verdicts.read(file, "machine 18") == {"a": None} and verdicts.read(file, "machine 0") == {}
    assert len(json.loads(file.read_text())["verdicts"]) == 8


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    verdicts.remember(tmp_path / "file" / "kernels.json", "x", {"a": None})
    (tmp_path / "folder" / "kernels.json").mkdir(parents=True)
    verdicts.remember(tmp_path / "folder" / "kernels.json", "x", {"a": None})
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["kernels.json"]


def test_what_lacked_memory_is_asked_again(emulator, tmp_path):
    def make(**parts):
        def call(**how):
            raise RuntimeError("[malloc] Unable to allocate 5 bytes: out of memory")

        return call

    model, file = model_of("dense"), tmp_path / "kernels.json"
    with using(Backend("emulator", make)), pytest.warns(KernelWarning, match="memory"):
        check_kernels(model, file=file)
    assert set(check_kernels(model, file=file).values()) == {None}


def test_the_check_of_a_large_model_is_small():
    """Launches and bytes of what is tried for the 35B-A3B at 4 bits, on a pretended GPU that computes nothing."""
    moved = []

    def make(**parts):
        def call(*, inputs, output_shapes, output_dtypes, **how):
            outputs = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            moved.append(sum(a.nbytes for a in [*inputs, *outputs]))
            return outputs

        return call

    model = Model(ModelConfig.from_dict(geometry.config("35B-A3B", 4)))  # lazy: no weight is made
    nn.quantize(model, group_size=64, bits=4, class_predicate=lambda path, module: hasattr(module, "to_quantized"))
    with using(Backend("counting", make)):
        model.norm.weight = model.norm.weight.astype(mx.bfloat16)
        asked = {t.key: t for use in uses(model) for needed, _ in use.forms[:1] for t in needed}
        for trial in asked.values():
            with using(Backend("counting", make)):
                mx.eval(trial.run())
    assert len(moved) == len(asked) == 18
    assert sum(moved) < 40e6, f"{sum(moved):,} bytes"
