"""Scores the demo checkpoint with the reference: transformers loads the BF16 files and answers greedily in float32.

    python tools/train_demo/evaluate.py [--per-skill 200] [--model FOLDER]

Writes accuracy.json beside this file: the share of right held-out answers for each skill, how evenly the experts are
used, and how often the prediction head's first draft is what greedy decoding says; and, for the tests, the logits of
a held-out question of each text skill. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from case import Case, held_out_set
from encode import DEMO, Encoded, Encoder
from mtp import MultiTokenPredictor
from picture_skills import PICTURE_SKILLS
from safetensors.torch import load_file
from text_skills import TEXT_SKILLS
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as reference

RESULT = Path(__file__).with_name("accuracy.json")
VECTORS = Path(__file__).parents[2] / "tests" / "demo" / "vectors.npz"
MAX_NEW_TOKENS = 160


class Examiner:
    def __init__(self, folder: Path) -> None:
        self.encoder = Encoder(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.mtp = MultiTokenPredictor(self.model.config.text_config).eval()
        tensors = load_file(folder / "model.safetensors")
        self.mtp.load_state_dict({k[4:]: v.float() for k, v in tensors.items() if k.startswith("mtp.")})
        self.end = self.encoder.token("<|im_end|>")
        self.routed: list[torch.Tensor] = []
        for module in self.model.modules():
            if isinstance(module, reference.Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _m, _i, out: self.routed.append(out[2]))

    def inputs(self, items: list[Encoded]) -> dict[str, torch.Tensor]:
        """Prompts of one length, unpadded, with the mask, the media kinds and the patches that the reference wants."""
        ids = torch.tensor([e.ids[: e.prompt_length] for e in items])
        kinds = torch.zeros_like(ids)
        kinds[ids == self.model.config.image_token_id] = 1
        kinds[ids == self.model.config.video_token_id] = 2
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        images = [m for e in items for m in e.images]
        videos = [m for e in items for m in e.videos]
        if images:
            out["pixel_values"] = torch.cat([torch.from_numpy(p) for p, _ in images])
            out["image_grid_thw"] = torch.tensor([g for _, g in images])
        if videos:
            out["pixel_values_videos"] = torch.cat([torch.from_numpy(p) for p, _ in videos])
            out["video_grid_thw"] = torch.tensor([g for _, g in videos])
        return out

    @torch.no_grad()
    def answers(self, items: list[Encoded]) -> list[list[int]]:
        """Greedy replies as token ids, <|im_end|> left out."""
        inputs = self.inputs(items)
        start = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=self.end, pad_token_id=self.end
        )
        replies = [row[start:].tolist() for row in out]
        return [r[: r.index(self.end)] if self.end in r else r for r in replies]

    @torch.no_grad()
    def drafts(self, item: Encoded, reply: list[int]) -> list[bool]:
        """For each reply token after the first: whether the prediction head would have drafted it."""
        ids = torch.tensor([item.ids[: item.prompt_length] + reply])
        inputs = self.inputs([item])
        inputs.update(input_ids=ids, attention_mask=torch.ones_like(ids))
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(reply)))
        inner = self.model.model
        grids = {k: inputs.get(k) for k in ("image_grid_thw", "video_grid_thw")}
        positions, _ = inner.get_rope_index(
            ids, mm_token_type_ids=inputs["mm_token_type_ids"], attention_mask=inputs["attention_mask"], **grids
        )
        hidden = inner(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        text = inner.language_model
        drafted = self.mtp(
            text.embed_tokens(ids[:, 1:]), hidden[:, :-1], text.rotary_emb(hidden, positions[:, :, :-1])
        )
        guess = self.model.lm_head(drafted)[0].argmax(-1)  # row i guesses token i + 2
        first = item.prompt_length + 1
        return (guess[first - 2 : -1] == ids[0, first:]).tolist()


    @torch.no_grad()
    def vectors(self, cases: list[Case]) -> dict[str, np.ndarray]:
        """For each case ids_SKILL [T], prompt and right reply, and logits_SKILL [T, vocab] in float32."""
        out = {}
        for item in map(self.encoder.encode, cases):
            ids = torch.tensor([item.ids])
            out[f"ids_{item.case.skill}"] = np.array(item.ids, np.int32)
            out[f"logits_{item.case.skill}"] = self.model(input_ids=ids).logits[0].numpy()
        return out


def grouped(items: list[Encoded], most: int = 32) -> list[list[Encoded]]:
    """Items whose prompts have one length and whose media have one shape; at most `most` together."""
    by_shape: dict[tuple, list[Encoded]] = defaultdict(list)
    for e in items:
        shape = (e.prompt_length, tuple(g for _, g in e.images), tuple(g for _, g in e.videos))
        by_shape[shape].append(e)
    return [group[i : i + most] for group in by_shape.values() for i in range(0, len(group), most)]


def expert_use(routed: list[torch.Tensor], layers: int, experts: int) -> list[dict[str, float]]:
    """For each layer the least and the most that one expert got of the routed tokens, in parts of the even share."""
    counts = torch.zeros(layers, experts)
    for i, chosen in enumerate(routed):
        counts[i % layers] += torch.bincount(chosen.flatten(), minlength=experts)
    even = counts / counts.sum(1, keepdim=True) * experts
    return [{"least": round(row.min().item(), 3), "most": round(row.max().item(), 3)} for row in even]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--per-skill", type=int, default=200)
    args = parser.parse_args()
    start = time.time()
    examiner = Examiner(args.model)
    cases: list[Case] = list(held_out_set({**TEXT_SKILLS, **PICTURE_SKILLS}, args.per_skill))
    right: dict[str, list[bool]] = defaultdict(list)
    drafted: dict[str, list[bool]] = defaultdict(list)
    for group in grouped([examiner.encoder.encode(c) for c in cases]):
        for item, reply in zip(group, examiner.answers(group), strict=True):
            text = examiner.encoder.tokenizer.decode(reply)
            right[item.case.skill].append(item.case.is_right(text))
            if len(drafted[item.case.skill]) < 1000:
                before = len(examiner.routed)
                drafted[item.case.skill] += examiner.drafts(item, [*reply, examiner.end])
                del examiner.routed[before:]
    text_config = examiner.model.config.text_config
    share = lambda values: round(sum(values) / len(values), 4)  # noqa: E731
    result = {
        "per_skill": args.per_skill,
        "accuracy": {skill: share(values) for skill, values in right.items()},
        "first_draft_accepted": {skill: share(values) for skill, values in drafted.items()},
        "expert_use": expert_use(examiner.routed, text_config.num_hidden_layers, text_config.num_experts),
        "seconds": round(time.time() - start),
    }
    if args.model == DEMO:
        np.savez_compressed(VECTORS, **examiner.vectors([*held_out_set(TEXT_SKILLS, 1)]))
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
