"""What is recorded as routing is what the layers' routers chose."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import routing
from benchmarks.likelihood import Question
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.layers import moe
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


def test_recorded_is_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("moe")
    model = load_model(write_checkpoint(tmp_path / "model", config, random_tensors(config)))
    asked = [Question("some", [3, 1, 4, 1, 5], [9, 2], []), Question("other", [6, 5], [3, 5, 8], [])]
    monkeypatch.setattr(routing, "questions", lambda processor, per_skill: [*asked])
    norms, chosen, route = [layer.post_attention_layernorm for layer in model.layers], [], moe.route

    def listening(scores: mx.array, top_k: int, **more: bool) -> tuple[mx.array, mx.array]:
        found = route(scores, top_k, **more)
        chosen.append(np.array(found[0]))
        return found

    monkeypatch.setattr(moe, "route", listening)
    traces = list(routing.record(model, None, per_skill=1))
    assert sorted(trace.prompt for trace in traces) == [2, 5]
    layers = len(model.layers)
    for number, trace in enumerate(traces):
        np.testing.assert_array_equal(trace.ids, np.stack(chosen[number * layers : (number + 1) * layers]))
        for name in routing.PREDICTIONS:
            blind = 2 if name == routing.TWO_AHEAD else 1
            assert trace.ranked[name].shape == (*trace.ids.shape[:2], trace.num_experts)
            assert (trace.ranked[name][:blind] == -1).all() and (trace.ranked[name][blind:] >= 0).all()
    assert [layer.post_attention_layernorm for layer in model.layers] == norms
