"""A checkpoint on disk for whole runs, and a model that says what a test wants for everything about the screen."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import library
from mlx_qwen35.cache import Cache
from mlx_qwen35.cli.main import main
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.processor import Processor
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.text.folders import write_text_files

VOCAB = 320
THINKING = "<|im_start|>assistant\n<think>\n"
NOT_THINKING = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    config = tiny_config("moe", vocab_size=VOCAB, eos_token_id=VOCAB - 1, max_position_embeddings=60_000)
    write_checkpoint(folder, config, random_tensors(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return write_text_files(folder)


class Speaker:
    """Gives the n-th question the n-th reply, whatever else the prompt says. `computed`: how many tokens it was fed."""

    def __init__(self, processor: Processor, replies: list[str]) -> None:
        self.config = SimpleNamespace(text=SimpleNamespace(vocab_size=VOCAB))
        self.replies = [processor.encode(reply + "<|im_end|>") for reply in replies]
        self.computed = 0
        self._turn = processor.tokenizer.token_id("<|im_start|>")
        self._headers = [processor.encode(header) for header in (NOT_THINKING, THINKING)]
        self._questions = [processor.encode(f"<|im_start|>{role}\n") for role in ("user", "tool")]
        self._seen: list[int] = []

    def make_cache(self) -> Cache:
        return Cache([])

    def hidden(self, tokens: mx.array, cache: Cache, media: object = ()) -> mx.array:
        self.computed += tokens.size
        self._seen[cache.offset :] = tokens[0].tolist()
        cache.offset += tokens.size
        logits = np.zeros((1, tokens.size, VOCAB), dtype=np.float32)
        logits[0, -1, self._next()] = 20.0
        return mx.array(logits)

    def head(self, hidden: mx.array) -> mx.array:
        return hidden

    def _next(self) -> int:
        start = len(self._seen) - 1 - self._seen[::-1].index(self._turn)
        turn = self._seen[start:]
        for header in self._headers:
            if turn[: len(header)] == header:
                asked = sum(
                    self._seen[at : at + len(question)] == question
                    for question in self._questions
                    for at in range(len(self._seen))
                )
                reply = self.replies[asked - 1]
                said = len(turn) - len(header)
                return reply[min(said, len(reply) - 1)]
        return 0


@pytest.fixture
def speak(checkpoint, monkeypatch):
    """speak("reply", ...) makes every load give a Speaker; `loads` are the arguments it was called with."""

    def speak(*replies: str) -> SimpleNamespace:
        config = ModelConfig.from_folder(checkpoint)
        processor = Processor.from_folder(checkpoint, config)
        model = Speaker(processor, list(replies))
        loads = []

        def load(ref=None, **arguments):
            loads.append((ref, arguments))
            return model, processor

        monkeypatch.setattr(library, "load", load)
        return SimpleNamespace(model=model, processor=processor, loads=loads)

    return speak


@pytest.fixture
def run(capsys, monkeypatch):
    """run("generate", ..., stdin="text") -> status, out, err"""

    def run(*argv: str, stdin: str = "") -> SimpleNamespace:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        status = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run
