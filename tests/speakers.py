"""Fixtures: a checkpoint on disk for whole runs, one that sees, and a model that says what a test wants."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import library
from mlx_qwen35.cache import Cache
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.library.holding import Held
from mlx_qwen35.processor import Processor
from mlx_qwen35.vision.tower import VisionTower
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conftest import CHECKOUT
from tests.text.folders import tokenizer_config, tokenizer_json, write_text_files

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


@pytest.fixture(scope="session")
def seeing(tmp_path_factory) -> Path:
    """A checkpoint with a vision tower, for pictures of 8 x 8 pixels a token; its answers are noise."""
    folder = tmp_path_factory.mktemp("cli") / "seeing"
    folder.mkdir()
    tokenizer = tokenizer_json()
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    added["<|video_pad|>"] = max(added.values()) + 1
    pad = next(token for token in tokenizer["added_tokens"] if token["content"] == "<|image_pad|>")
    tokenizer["added_tokens"].append({**pad, "id": added["<|video_pad|>"], "content": "<|video_pad|>"})
    template = (CHECKOUT / "mlx_qwen35" / "demo" / "chat_template.jinja").read_text()
    write_text_files(folder, tokenizer=tokenizer, tokenizer_config=tokenizer_config(tokenizer), template=template)
    config = tiny_config(vision=True, vocab_size=VOCAB, eos_token_id=VOCAB - 1, max_position_embeddings=4000)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config |= {f"{key}_token_id": added[f"<|{name}|>"] for key, name in names.items()}
    write_checkpoint(folder, config, random_tensors(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **colours}
    for name, most in (("preprocessor_config", 64 * 64), ("video_preprocessor_config", 8 * 64 * 64)):
        (folder / f"{name}.json").write_text(
            json.dumps({**patches, "size": {"shortest_edge": 64, "longest_edge": most}})
        )
    return folder


@pytest.fixture
def encoded(monkeypatch) -> list[tuple[int, int, int]]:
    """The grids of all media that were encoded."""
    encode, seen = VisionTower.encode, []

    def watched(self, pixels, grids):
        seen.extend(grids)
        return encode(self, pixels, grids)

    monkeypatch.setattr(VisionTower, "encode", watched)
    return seen


FEW = 32  # tokens that may be verified together


class Speaker:
    """Gives the n-th question the n-th reply, whatever else the prompt says. `computed`: how many tokens it was fed."""

    prefill_chunk, together_chunk, snapshot_bytes = 2048, 0, 1 << 20
    mtp = None
    expert_stats = None

    def computing(self, tokens: int) -> AbstractContextManager[None]:
        return nullcontext()

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

    def unload(self) -> None:
        self.unloaded = True

    def hidden(self, tokens: mx.array, cache: Cache, media: object = (), *, more: bool = False, **how) -> mx.array:
        self.computed += tokens.size
        logits = np.zeros((1, tokens.size, VOCAB), dtype=np.float32)
        last = tokens.size - 1 if tokens.size > FEW else 0  # of a prompt nobody asks for more
        self._seen[cache.offset :] = tokens[0, :last].tolist()
        for at, token in enumerate(tokens[0, last:].tolist(), last):
            self._seen.append(token)
            logits[0, at, self._next()] = 20.0
        cache.offset += tokens.size
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
    """speak("reply", ...) makes every load give a Speaker; `loads` are the arguments that the model was loaded with."""

    def speak(*replies: str) -> SimpleNamespace:
        config = ModelConfig.from_folder(checkpoint)
        processor = Processor.from_folder(checkpoint, config)
        model = Speaker(processor, list(replies))
        loads = []

        def hold(folder, memory, *, dtype, context_length, **others):
            loads.append((folder, {"memory": memory, "dtype": dtype, "context_length": context_length}))
            return Held(folder, dtype, context_length, None)

        monkeypatch.setattr(library, "find", lambda ref, **arguments: ref)
        monkeypatch.setattr(library, "hold", hold)
        monkeypatch.setattr(library, "load_processor", lambda ref, **arguments: processor)
        monkeypatch.setattr(library, "load_held", lambda held, **arguments: model)
        return SimpleNamespace(model=model, processor=processor, loads=loads)

    return speak
