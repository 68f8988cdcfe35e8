"""Faults planted in the kernels themselves: their tests have to notice. And every body there is has a test here."""

import dataclasses
import re
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_qwen35.kernels.expert_down as expert_down
import mlx_qwen35.kernels.expert_gate_up as expert_gate_up
import mlx_qwen35.kernels.router as router
from mlx_qwen35.kernels.backend import FOLDER
from tests.kernels.stacks import Matrix
from tests.kernels.test_experts import down_case, gate_up_case
from tests.kernels.test_router import by_id, distinct
from tests.metal_emulator import check

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


CASES = {
    "router": (router, router_case),
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
]


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


@pytest.mark.parametrize("name, file, old, new", FAULTS)
def test_a_fault_is_noticed(name, file, old, new, monkeypatch, tmp_path):
    operation, case = CASES[name]
    planted(monkeypatch, tmp_path, operation, file, old, new)
    with pytest.raises(AssertionError):
        check(**case())
