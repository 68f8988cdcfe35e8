"""Faults planted in the kernels themselves: their tests have to notice. And every body there is has a test here."""

import dataclasses
import re
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_qwen35.kernels.add_norm as add_norm
import mlx_qwen35.kernels.attention_inputs as attention_inputs
import mlx_qwen35.kernels.delta_decode as delta_decode
import mlx_qwen35.kernels.expert_down as expert_down
import mlx_qwen35.kernels.expert_gate_up as expert_gate_up
import mlx_qwen35.kernels.ragged_attention as ragged_attention
import mlx_qwen35.kernels.router as router
from mlx_qwen35.kernels.backend import FOLDER
from tests.kernels import test_add_norm, test_attention_inputs, test_delta_decode, test_ragged_attention
from tests.kernels.stacks import Matrix
from tests.kernels.test_experts import down_case, gate_up_case
from tests.kernels.test_router import by_id, distinct
from tests.metal_emulator import check
from tests.metal_emulator.program import KernelFault

Q3, Q8 = ("affine", 3, 32), ("affine", 8, 64)


def router_case():
    mx.random.seed(5)
    gate = Matrix.random(Q8, (1, 576))
    # Far from 0: exponentials are finite only relative to the largest.
    arrays = [distinct(2, 70) + 200, mx.random.normal((2, 576)), *gate.arrays]
    return {
        "kernels": lambda logits, x, *g: by_id(router.route(logits, 4, x, gate.of(g))),
        "reference": lambda logits, x, *g: by_id(router.reference.route_with_shared(logits, 4, x, gate.of(g).values())),
        "arrays": arrays,
    }


def delta_decode_case(*, each):
    """Three value heads a key head, more rows than SIMD groups, rows and columns that do not fill them."""
    how = {"key_heads": 2, "eps": test_delta_decode.EPS}

    def reference(*arrays):
        found = delta_decode.reference.delta_decode(*arrays, **how)
        return found if each else test_delta_decode.last(found)

    return {
        "kernels": lambda *a: delta_decode.delta_decode(*a, **how, each=each),
        "reference": reference,
        "arrays": test_delta_decode.inputs((2, 3, 2, 6, 36, 42, 4)),
    }


def attention_inputs_case():
    """Queries and keys out of one array, each sequence at positions of its own."""
    size = (2, 3, 5, 2, 40, 24)
    q, k, *rest = test_attention_inputs.inputs(size, axes=True)
    how, between = test_attention_inputs.how(size) | {"eps": 1e-2}, q.shape[-1] + 3
    return {
        "kernels": lambda j, *a: attention_inputs.attention_inputs(j, j, *a, **how, keys_at=between),
        "reference": lambda j, *a: attention_inputs.reference.attention_inputs(
            j[..., : between - 3], j[..., between:], *a, **how
        ),
        "arrays": [mx.concatenate([q, mx.ones((*q.shape[:2], 3)), k], axis=-1), *rest],
    }


def add_norm_case():
    return {
        "kernels": lambda *a: add_norm.add_norm(*a, eps=1e-3),
        "reference": lambda *a: add_norm.reference.add_norm(*a, eps=1e-3),
        "arrays": test_add_norm.inputs((3, 300), mx.float32),
    }


def ragged_attention_case(*, span, dim=36, dtype=mx.float32):
    """Five queries a head of keys, so that SIMD groups share them unequally; pieces, spans that are not full."""
    return test_ragged_attention.case(10, 2, dim, dtype, span=span, spread=8.0)


CASES = {
    "ragged_attention": (ragged_attention, lambda: ragged_attention_case(span=16) | {"launches": 2}),
    "ragged_attention, whole": (ragged_attention, lambda: ragged_attention_case(span=512)),
    "ragged_attention, wide": (
        ragged_attention,
        lambda: ragged_attention_case(span=16, dim=256, dtype=mx.float16) | {"launches": 2},
    ),
    "router": (router, router_case),
    "delta_decode": (delta_decode, lambda: delta_decode_case(each=False)),
    "delta_decode, each": (delta_decode, lambda: delta_decode_case(each=True)),
    "attention_inputs": (attention_inputs, attention_inputs_case),
    "add_norm": (add_norm, add_norm_case),
    "expert_gate_up": (expert_gate_up, lambda: gate_up_case(Q3, Q8, 2, 3, mx.float32, size=90, hidden=576)),
    "expert_down": (expert_down, lambda: down_case(Q3, Q8, 2, 3, mx.float32, size=544)),
}
# Operation, file, what is replaced, by what.
FAULTS = [
    ("router", "router/body.metal", "left &= ~(1u << (id / 32));", ""),
    ("router", "router/body.metal", "if (id < E)", "if (id + 1 < E)"),
    ("router", "router/body.metal", "top - largest", "top"),
    ("router", "router/body.metal", "mine / sum", "mine"),
    ("router", "router/body.metal", "block += 32", "block += 64"),
    ("router", "router/body.metal", "sum = simd_sum(sum);", ""),
    ("router", "router/body.metal", "row * WIDTH + block", "block"),
    ("expert_gate_up", "expert_gate_up/body.metal", "ids[row * K + slot]", "ids[slot]"),
    ("expert_gate_up", "expert_gate_up/body.metal", "/ (1.0f + metal::precise::exp(-g))", ""),
    ("expert_gate_up", "expert_gate_up/body.metal", "uint rows = slot < K ? I : J;", "uint rows = I;"),
    ("expert_gate_up", "expert_gate_up/body.metal", "float total = load_block", "float total = 0.0f * load_block"),
    ("expert_gate_up", "expert_gate_up/body.metal", "x + row * H", "x"),
    ("expert_down", "expert_down/body.metal", "slot <= K", "slot < K"),
    ("expert_down", "expert_down/body.metal", "weights[row * (K + 1) + slot]", "weights[row * K + slot]"),
    ("expert_down", "expert_down/body.metal", "sums[r] += weight * parts[r];", "sums[r] += parts[r];"),
    ("expert_down", "expert_down/body.metal", "(row * K + slot) * I", "slot * I"),
    ("expert_down", "weights.metal", "q |= w[word + 1] << (16 - shift);", ""),
    ("expert_gate_up", "weights.metal", "(1u << BITS) - 1u", "(1u << BITS) - 2u"),
    ("expert_down", "weights.metal", "block * BLOCK / GROUP;", "block * BLOCK / (2 * GROUP);"),
    *((name, "delta_decode/body.metal", old, new) for name, old, new in [
        ("delta_decode", "head / (HV / HK)", "head % HK"),
        ("delta_decode", "u / (1.0f + metal::precise::exp(-u))", "u"),
        ("delta_decode", "wanted && (i", "(each || t == 0) && (i"),
        ("delta_decode", "if (row < DV && wanted)", "if (row < DV && (each || t == 0))"),
        ("delta_decode, each", "to * (TAPS - 1)", "batch * (TAPS - 1)"),
        ("delta_decode, each", "to * HV + head", "batch * HV + head"),
        ("delta_decode, each", "(i >= 2 * DK || first_of_key_head)", "i >= 2 * DK"),
        ("delta_decode, each", "each ? token : batch", "batch"),
        ("delta_decode", "threadgroup_barrier(mem_flags::mem_threadgroup);  // queries", "// queries"),
        ("delta_decode", "threadgroup_barrier(mem_flags::mem_threadgroup);  // made", "// made"),
        ("delta_decode", "+ 1e-6f) * static_cast<float>(DK)", "+ 1e-6f)"),
        ("delta_decode", " + static_cast<float>(dt_bias[head])", ""),
        ("delta_decode", "s[r][c] *= decay;", ""),
        ("delta_decode", "known = simd_sum(known);", ""),
        ("delta_decode", "out = simd_sum(out);", ""),
        ("delta_decode", " - known) * beta", ") * beta"),
        ("delta_decode", "i = lane; i < DV;", "i = lane; i < 32;"),
        ("delta_decode", "static_cast<float>(norm[i]) * gate", "static_cast<float>(norm[i])"),
    ]),
    *(("attention_inputs", "attention_inputs/body.metal", old, new) for old, new in [
        ("head * 2 * D : row", "head * D : row"),
        ("row * KEYS + FIRST", "row * KEYS"),
        ("(SAME ? 0 : batch)", "0"),
        ("simd_sum(squares)", "squares"),
        (" + eps[0]", ""),
        ("int other = i < HALF ? i + HALF : i - HALF", "int other = i"),
        ("(i < HALF ? -beside : beside)", "beside"),
        (" * static_cast<float>(q_norm[other])", ""),
        ("i < 2 * HALF", "i < HALF"),
        ("queries[from + D + i]", "queries[from + i]"),
        ("if (row < queries_shape[0] * tokens)", "if (row + 1 < queries_shape[0] * tokens)"),
    ]),
    *((name, "ragged_attention/body.metal", old, new) for name, old, new in [
        ("ragged_attention, whole", "WHOLE ? sum / all : sum", "sum"),
        ("ragged_attention", "WHOLE ? sum / all : sum", "sum / all"),
        ("ragged_attention", "(item - table[about] + table[about + 1]) * SPAN", "(item - table[about]) * SPAN * 2"),
        ("ragged_attention", "metal::min(begin + SPAN, static", "metal::min(begin + SPAN - 1, static"),
        ("ragged_attention", "asking * HQ + kv_head", "kv_head"),
        ("ragged_attention", "kv_head * GROUP + head) * D", "head) * D"),
        ("ragged_attention", "while (position >= table[piece + 1])", "while (position > table[piece + 1])"),
        ("ragged_attention", "while (position >=", "if (position >="),
        ("ragged_attention", "+ table[piece + 4] + position", "+ position"),
        ("ragged_attention", "table[piece + 3] + kv_head", "kv_head"),
        ("ragged_attention", "metal::precise::rsqrt(static_cast<float>(D)) * ", ""),
        ("ragged_attention", "score = simd_sum(score);", ""),
        ("ragged_attention", "first + b < end ? score : LEAST", "score"),
        ("ragged_attention", "total[r] *= fade;", ""),
        ("ragged_attention", "sums[r][c] *= fade;", ""),
        ("ragged_attention", "sums[r][c] * fade;", "sums[r][c];"),
        ("ragged_attention", "metal::fast::exp2(highest[s * HEADS + r] - peak)", "1.0f"),
        ("ragged_attention", "const size_t to = static_cast<size_t>(item) * HQ", "const size_t to = asking * HQ"),
        ("ragged_attention", "threadgroup_barrier(mem_flags::mem_threadgroup);\n#pragma", "#pragma"),
        ("ragged_attention", "threadgroup_barrier(mem_flags::mem_threadgroup);  // shown is there", ""),
        ("ragged_attention", "threadgroup_barrier(mem_flags::mem_threadgroup);  // shown was read", ""),
        ("ragged_attention", "if (head < GROUP)", "if (head + 1 < GROUP)"),
        ("ragged_attention", "first += SPLITS * BLOCK", "first += SPLITS * BLOCK + 1"),
        ("ragged_attention", "v0, v1, v2, v3", "v0, v1, v3, v2"),
    ]),
    *((name, "ragged_attention/columns.metal", old, new) for name, old, new in [
        ("ragged_attention, wide", "word >> 16", "word & 0xffffu"),
        ("ragged_attention, wide", "(4 * n + 2) * each, four.z", "(4 * n + 2) * each, four.w"),
        ("ragged_attention", "column < D ? static_cast<float>", "column + 1 < D ? static_cast<float>"),
        ("ragged_attention", "n == 0 ? a : n == 1 ? b : c", "n == 0 ? a : b"),
    ]),
    *(("add_norm", "add_norm/body.metal", old, new) for old, new in [
        (" + static_cast<float>(added[start + i])", ""),
        ("squares = simd_sum(squares);", ""),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
        ("s < SIMDS", "s + 1 < SIMDS"),
        (" + eps[0]", ""),
        ("weight[i]", "weight[0]"),
        ("if (i < H)", "if (i + 1 < H)"),
    ]),
]  # fmt: skip


def planted(monkeypatch, tmp_path, operation, file, old, new):
    text = (FOLDER / file).read_text()
    assert text.count(old) >= 1
    (tmp_path / "changed.metal").write_text(text.replace(old, new, 1))
    kernel = operation._KERNEL
    change = {"_made": {}}
    if file == kernel.body:
        change["body"] = str(tmp_path / "changed.metal")
    else:
        change["helpers"] = [str(tmp_path / "changed.metal") if h == file else h for h in kernel.helpers]
    monkeypatch.setattr(operation, "_KERNEL", dataclasses.replace(kernel, **change))


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in FOLDER.rglob("*/*.metal")}))
def test_every_body_is_compared_and_compiled(folder):
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    about = [text for text in texts if re.search(rf"kernels(\.| import .*\b){folder}\b", text)]
    assert any("check(" in text and "compile_for_cuda(" in text for text in about)


@pytest.mark.parametrize("name", CASES)
def test_no_fault(name):
    check(**CASES[name][1]())


OFTEN, SELDOM = FAULTS[::2], [pytest.param(*fault, marks=pytest.mark.soak) for fault in FAULTS[1::2]]


@pytest.mark.parametrize("name, file, old, new", [*OFTEN, *SELDOM])
def test_a_fault_is_noticed(name, file, old, new, monkeypatch, tmp_path):
    operation, case = CASES[name]
    planted(monkeypatch, tmp_path, operation, file, old, new)
    with pytest.raises((AssertionError, KernelFault)):
        check(**case())
