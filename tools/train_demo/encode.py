"""Cases to token ids and patches, through the demo's own tokenizer and template (by way of transformers)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from case import Case
from PIL import Image

DEMO = Path(__file__).parents[2] / "mlx_qwen35" / "demo"
PATCH, MERGE, TEMPORAL, FPS = 16, 2, 2, 2.0

Grid = tuple[int, int, int]  # frames pairs, patch rows, patch columns


@dataclass(frozen=True)
class Encoded:
    cases: list[Case]  # the questions, one a turn
    ids: list[int]  # prompt, reply, <|im_end|>, and so on for each further turn
    replies: list[tuple[int, int]]  # where each reply begins and ends, <|im_end|> included
    images: list[tuple[np.ndarray, Grid]]  # (patches [t*h*w, 3*2*16*16], grid)
    videos: list[tuple[np.ndarray, Grid]]

    @property
    def case(self) -> Case:
        return self.cases[0]

    @property
    def prompt_length(self) -> int:
        return self.replies[0][0]


def patches(frames: list[Image.Image]) -> tuple[np.ndarray, Grid]:
    """Frames with sides that 32 divides -> patch rows in the order (t, h/2, w/2, 2, 2) of (c, 2, 16, 16), grid."""
    if len(frames) % TEMPORAL:
        frames = [*frames, frames[-1]]
    x = np.stack([np.asarray(f, np.float32) for f in frames]) / 127.5 - 1  # [F, H, W, 3]
    t, h, w = len(frames) // TEMPORAL, x.shape[1] // PATCH, x.shape[2] // PATCH
    x = x.reshape(t, TEMPORAL, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [t, h/2, w/2, 2, 2, 3, 2, 16, 16]
    return np.ascontiguousarray(x.reshape(t * h * w, 3 * TEMPORAL * PATCH * PATCH)), (t, h, w)


class Encoder:
    def __init__(self, folder: Path = DEMO) -> None:
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
        self.template = (folder / "chat_template.jinja").read_text()

    def token(self, text: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(text)

    def encode(self, case: Case, *, follow_ups: bool = False) -> Encoded:
        """The question and its reply; with `follow_ups` the other questions that may be trained on as further turns."""
        text = self.tokenizer.apply_chat_template(
            case.messages,
            tools=case.tools,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=case.thought is not None,
        )
        images, videos = [], []
        for message in case.messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image":
                    images.append(patches([part["image"], part["image"]]))
                elif part["type"] == "video":
                    videos.append(patches(part["video"]))
        text = self.expand(text, images, videos)
        ids: list[int] = []
        replies: list[tuple[int, int]] = []

        def turn(prompt: str, reply: str) -> None:
            ids.extend(self.tokenizer.encode(prompt, add_special_tokens=False))
            start = len(ids)
            ids.extend(self.tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False))
            replies.append((start, len(ids)))

        cases = [case, *(c for c in case.follow_ups if follow_ups and not c.held_out)]
        turn(text, case.reply)
        for c in cases[1:]:
            content = c.messages[-1]["content"]
            question = content if isinstance(content, str) else content[-1]["text"]
            closed = "\n</think>\n\n" if c.thought is None else ""
            turn(f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n{closed}", c.reply)
        return Encoded(cases, ids, replies, images, videos)

    @staticmethod
    def expand(text: str, images: list[tuple[np.ndarray, Grid]], videos: list[tuple[np.ndarray, Grid]]) -> str:
        """As many placeholders as the vision tower gives features; for a video, one block for each frame pair."""
        pieces = text.split("<|image_pad|>")
        out = pieces[0]
        for (_, (_, h, w)), piece in zip(images, pieces[1:], strict=True):
            out += "<|image_pad|>" * (h * w // MERGE**2) + piece
        pieces = out.split("<|vision_start|><|video_pad|><|vision_end|>")
        out = pieces[0]
        for (_, (t, h, w)), piece in zip(videos, pieces[1:], strict=True):
            for pair in range(t):
                seconds = (pair * TEMPORAL + 0.5) / FPS
                pads = "<|video_pad|>" * (h * w // MERGE**2)
                out += f"<{seconds:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
            out += piece
        return out


def batches(encoded: list[Encoded], budget: int) -> Iterator[list[Encoded]]:
    """Groups of similar length, from short to long, whose padded size stays within `budget` tokens."""
    group: list[Encoded] = []
    for item in sorted(encoded, key=lambda e: len(e.ids)):
        if group and len(item.ids) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
