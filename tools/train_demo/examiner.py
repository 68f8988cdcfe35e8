"""The demo checkpoint as transformers runs it, in float32: what it answers, drafts and computes.

Knows prompts, replies and logits, and how the experts are used. Knows no questions and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mtp import MultiTokenPredictor
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as reference

from tests.reference_processor import ReferenceProcessor, ReferencePrompt

MAX_NEW_TOKENS = 160
TOGETHER = 64  # prompts in a batch


@dataclass(frozen=True)
class Reply:
    """tokens: without <|im_end|>; margin: by how much the likeliest token led the next one where it was closest, the
    token after the last included."""

    tokens: list[int]
    text: str
    margin: float


class Examiner:
    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # a model this small has nothing to share out
        self.processor = ReferenceProcessor(folder)
        self.tokenizer = self.processor.processor.tokenizer
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.mtp = MultiTokenPredictor(self.model.config.text_config).eval()
        tensors = load_file(folder / "model.safetensors")
        self.mtp.load_state_dict({k[4:]: v.float() for k, v in tensors.items() if k.startswith("mtp.")})
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        text = self.model.config.text_config
        routers = [m for m in self.model.modules() if isinstance(m, reference.Qwen3_5MoeTopKRouter)]
        assert len(routers) == text.num_hidden_layers
        self._used = torch.zeros(len(routers), text.num_experts)
        self._counting = False
        for layer, router in enumerate(routers):
            router.register_forward_hook(lambda _m, _i, out, layer=layer: self._count(layer, out[2]))

    def _count(self, layer: int, chosen: torch.Tensor) -> None:
        if self._counting:
            self._used[layer] += torch.bincount(chosen.flatten(), minlength=self._used.shape[1])

    def replies(self, prompts: Sequence[ReferencePrompt]) -> list[Reply]:
        """Greedy replies, in batches of like length."""
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].tokens))
        found: dict[int, Reply] = {}
        for start in range(0, len(order), TOGETHER):
            group = order[start : start + TOGETHER]
            found |= zip(group, self._replies([prompts[n] for n in group]), strict=True)
        return [found[n] for n in range(len(prompts))]

    @torch.no_grad()
    def _replies(self, prompts: list[ReferencePrompt]) -> Iterator[Reply]:
        inputs = batch([p.inputs for p in prompts], self.end)
        made = self.model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.end,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(made.logits).topk(2, dim=-1).values  # [steps, B, 2]
        leads = (best[..., 0] - best[..., 1]).T  # [B, steps]
        for row, lead in zip(made.sequences[:, inputs["input_ids"].shape[1] :].tolist(), leads, strict=True):
            tokens = row[: row.index(self.end)] if self.end in row else row
            text = self.tokenizer.decode(tokens)
            yield Reply(tokens, text, lead[: len(tokens) + 1].min().item())

    @torch.no_grad()
    def drafts(self, prompt: ReferencePrompt, reply: list[int]) -> list[bool]:
        """For each token of a reply after the first, and the end: whether the prediction head would have drafted it.
        Also counts which experts prompt and reply use."""
        inputs, reply = dict(prompt.inputs), [*reply, self.end]
        ids = inputs["input_ids"] = torch.tensor([prompt.tokens + reply])
        inputs["attention_mask"] = torch.ones_like(ids)
        kinds = inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(reply)))
        inner = self.model.model
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        positions, _ = inner.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
        self._counting = True
        hidden = inner(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        self._counting = False
        text = inner.language_model
        rope = text.rotary_emb(hidden, positions[:, :, :-1])
        drafted = self.mtp(text.embed_tokens(ids[:, 1:]), hidden[:, :-1], rope)
        guess = self.model.lm_head(drafted)[0].argmax(-1)  # row i guesses token i + 2
        first = len(prompt.tokens) + 1
        return (guess[first - 2 : -1] == ids[0, first:]).tolist()

    @torch.no_grad()
    def logits(self, prompt: ReferencePrompt, reply: str) -> tuple[np.ndarray, np.ndarray]:
        """ids [T] of a prompt, a reply and <|im_end|>, and the logits [T, vocab] in float32."""
        said = self.tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False)
        inputs = dict(prompt.inputs)
        ids = inputs["input_ids"] = torch.tensor([prompt.tokens + said])
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(said)))
        return np.array(ids[0], np.int32), self.model(**inputs).logits[0].numpy()

    def expert_use(self) -> list[dict[str, float]]:
        """For each layer the least and the most that one expert got of the tokens counted so far, in parts of the even
        share."""
        even = self._used / self._used.sum(1, keepdim=True) * self._used.shape[1]
        return [{"least": round(row.min().item(), 3), "most": round(row.max().item(), 3)} for row in even]


def batch(inputs: list[dict[str, torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """Prompts of a row each, padded on the left; their pixels one after the other."""
    width = max(i["input_ids"].shape[1] for i in inputs)
    out = {}
    for name, padding in (("input_ids", pad), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        rows = [torch.nn.functional.pad(i[name], (width - i[name].shape[1], 0), value=padding) for i in inputs]
        out[name] = torch.cat(rows)
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if found := [i[name] for i in inputs if name in i]:
            out[name] = torch.cat(found)
    return out
