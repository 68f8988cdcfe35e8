"""The same checkpoint in this package, mlx-lm and mlx-vlm, each in a process of its own that answers requests in turn.

    checkpoint(CASES["0.8B"], folder)       write it once: random weights, real geometry, 4 bits
    with Side("ours", folder) as side:      a process that has loaded it
        side.ask(prompt=512, new=16)        -> seconds to the first token, seconds of each further one, what it chose

A process that is not asked waits for its standard input, so that sides can take turns without loading again.
As a program, `python benchmarks/sides.py NAME FOLDER` is such a process.
Knows the public calls of the three projects. Knows nothing of how they work inside, and draws no conclusions.

On the CPU all compute in float32 (MLX's 16-bit products are slow and inexact there): this package by itself, the others
by set_dtype before their weights are read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks import geometry  # noqa: E402
from mlx_qwen35.machine.system import peak_resident_memory  # noqa: E402

CACHE = Path(tempfile.gettempdir()) / "mlx-qwen35-benchmarks"
SEED = 7  # of the prompts
_SAMPLE = 64  # ids whose log probabilities are compared
_IDS = 30000  # prompts have tokens below


@dataclass(frozen=True)
class Case:
    """A model to measure with. cut: what differs from the published size, "" if nothing does."""

    name: str
    size: str
    layers: int | None = None
    cut: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)


_SMALL = {
    "hidden_size": 1024, "num_attention_heads": 8, "linear_num_value_heads": 16, "vocab_size": 32768,
    "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
}  # fmt: skip
CASES = {
    case.name: case
    for case in (
        Case("0.8B", "0.8B"),
        Case("0.8B-8-layers", "0.8B", 8, "8 of 24 layers"),
        Case("0.8B-4-layers", "0.8B", 4, "4 of 24 layers, vocabulary 32768", {"vocab_size": 32768}),
        Case("35B-4-layers", "35B-A3B", 4, "4 layers, 8 of 64 experts, vocabulary 4096",
             {"num_experts": 64, "vocab_size": 4096}),
        Case("35B-8-layers", "35B-A3B", 8, "8 of 40 layers"),
        Case("small-moe", "35B-A3B", 8, "8 layers, hidden 1024, 8 of 64 experts of 256, vocabulary 32768", _SMALL),
    )
}


def checkpoint(case: Case, cache: Path = CACHE) -> Path:
    """The folder of a case's checkpoint below `cache`, written on the first call: 4 bits in groups of 64."""
    folder = cache / case.name
    config = _config(case)
    told = folder / "config.json"
    if not told.exists() or json.loads(told.read_text()) != config:
        from tests.experts.synthetic import write_synthetic

        shutil.rmtree(folder, ignore_errors=True)
        write_synthetic(folder, config)
    return folder


def _config(case: Case) -> dict[str, Any]:
    """With a tiny vision tower, without which mlx-vlm does not load it."""
    from tests.checkpoints import tiny_config

    config = geometry.config(case.size, case.layers, **case.overrides)
    vision = tiny_config("dense", vision=True)["vision_config"]
    vision |= {"model_type": config["model_type"], "out_hidden_size": config["text_config"]["hidden_size"]}
    how = {"group_size": 64, "bits": 4, "mode": "affine"}
    tokens = {"image_token_id": 248056, "video_token_id": 248057, "vision_start_token_id": 248053,
              "vision_end_token_id": 248054}  # fmt: skip
    return config | {"vision_config": vision, "quantization": how, "quantization_config": how} | tokens


class Side:
    """A process of one of the three projects, with a checkpoint loaded. Raises SystemExit with its words if it fails.

    loaded: what it said when it was ready: seconds and bytes.
    """

    program = Path(__file__)

    def __init__(self, name: str, folder: Path, *more: str):
        """more: what else the program is told."""
        command = [sys.executable, str(self.program), name, str(folder), *more]
        self.name = name
        self._ids = min(_IDS, json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"])
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT
        )

    def __enter__(self) -> Side:
        self.loaded = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        if self._process.wait(60) and not _[0]:
            raise SystemExit(f"{self.name} failed at its end:\n{self._process.stderr.read()}")

    def ask(self, prompt: int, new: int) -> dict[str, Any]:
        """Answer a prompt of so many tokens with so many, greedily.

        Seconds: "first" from the prompt to the first token, "later" of each further one. "tokens", and "logprobs" of
        some ids at the first. Bytes, the most so far: "peak" of arrays, "resident" of the process.
        """
        return self.send({"tokens": prompt_tokens(prompt, self._ids), "new": new})

    def send(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the program says to it."""
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            raise SystemExit(f"the process of {self.name} failed:\n{self._process.stderr.read()}")
        return json.loads(line)


def prompt_tokens(length: int, ids: int = _IDS) -> list[int]:
    """Token ids below `ids`, always the same."""
    import numpy as np

    return np.random.RandomState(SEED).randint(0, ids, length).tolist()


class _Ours:
    def __init__(self, folder: Path):
        from mlx_qwen35.checkpoint.load import load_model

        self._model = load_model(folder)

    def stream(self, tokens: list[int], new: int) -> Iterator[tuple[int, Any]]:
        from mlx_qwen35.generation import decode, prefill
        from mlx_qwen35.sampling import History, Sampler, Sampling

        sampling = Sampling(temperature=0.0)
        cache = self._model.make_cache()
        logits = prefill(self._model, tokens, cache)
        history = History(sampling, [tokens], self._model.config.text.vocab_size)
        for step in decode(self._model, cache, logits, Sampler(sampling), history, max_tokens=new):
            yield step.token, step.logprobs


class _MlxLm:
    def __init__(self, folder: Path):
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._model, _ = load_model(folder, lazy=True)
        ready(self._model, mx)

    def stream(self, tokens: list[int], new: int) -> Iterator[tuple[int, Any]]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        for token, logprobs in generate_step(mx.array(tokens), self._model, max_tokens=new):
            yield int(token), logprobs


class _MlxVlm:
    def __init__(self, folder: Path):
        import mlx.core as mx
        from mlx_vlm.utils import load_model

        self._model = load_model(folder, lazy=True)
        ready(self._model, mx)

    def stream(self, tokens: list[int], new: int) -> Iterator[tuple[int, Any]]:
        import mlx.core as mx
        from mlx_vlm.generate import generate_step

        for token, logprobs in generate_step(mx.array([tokens]), self._model, None, None, max_tokens=new):
            yield int(token), logprobs


def ready(model: Any, mx: Any) -> None:
    """A peer's weights as this package has them on the CPU, read."""
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())


_KINDS = {"ours": _Ours, "mlx-lm": _MlxLm, "mlx-vlm": _MlxVlm}
NAMES = tuple(_KINDS)


def _answer(side: Any, tokens: list[int], new: int) -> dict[str, Any]:
    import mlx.core as mx

    clock, made, seconds, first = time.perf_counter(), [], [], None
    for token, logprobs in side.stream(tokens, new):
        now = time.perf_counter()
        made.append(token)
        seconds.append(now - clock)
        first = logprobs if first is None else first
        clock = now
    return {
        "first": seconds[0],
        "later": seconds[1:],
        "tokens": made,
        "logprobs": first[:: max(1, first.size // _SAMPLE)][:_SAMPLE].astype(mx.float32).tolist(),
        "peak": mx.get_peak_memory(),
        "resident": peak_resident_memory(),
    }


def apart(answers: Sequence[dict[str, Any]]) -> float:
    """How far the first one's log probabilities are from the others' at most, in their standard deviations."""
    import numpy as np

    first, *others = (np.array(answer["logprobs"]) for answer in answers)
    return float(max(np.abs(other - first).max() for other in others) / first.std())


def arguments(description: str, rounds: int, cases: Sequence[str]) -> argparse.ArgumentParser:
    """What the benchmarks of this kind can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(cases))
    parser.add_argument("--peer", nargs="*", choices=NAMES[1:], default=["mlx-lm"])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--folder", type=Path, default=CACHE, help="where checkpoints are kept")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    return parser


def main() -> None:
    name, folder = sys.argv[1:]
    start = time.perf_counter()
    side = _KINDS[name](Path(folder))
    print(json.dumps({"seconds": time.perf_counter() - start, "resident": peak_resident_memory()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(side, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
