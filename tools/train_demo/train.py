"""Trains the demo checkpoint with transformers' Qwen3.5 MoE in float32 on a CPU; an interrupted run goes on.

    python tools/train_demo/train.py [--state STATE] [--tokens 14e6] [--workers 2]

Each worker is a process with one thread that reads its own cases; gradients are averaged after every step. STATE keeps
weights, optimizer and progress (about 100 MB, in ~/.cache/mlx-qwen35). Every `--every` steps the state, the BF16
checkpoint in mlx_qwen35/demo and the log beside this file are written; without a STATE a run goes on from these. Needs
torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from case import draw, held_out_set
from delta_rule import chunked_gated_delta_rule
from encode import DEMO, Encoded, Encoder, batches
from geometry import demo_config
from mtp import MultiTokenPredictor
from muon import Muon
from picture_skills import PICTURE_PRACTICE, PICTURE_SKILLS, worn
from routed import routed_experts
from safetensors.torch import load_file, save_file
from text_skills import TEXT_SKILLS, UNSCORED, with_history
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as reference

LOG = Path(__file__).with_name("log.jsonl")
SKILLS = {**TEXT_SKILLS, **PICTURE_SKILLS, **UNSCORED, **PICTURE_PRACTICE}
SHARE = {"small_sum": 0.3, "talk": 0.25, "tools": 0.7, "tool_answer": 1.5, "arithmetic": 4.0, "recall": 1.5}
SHARE |= {"json": 1.5, "sort": 3.0, "what": 1.5, "where": 7.0, "differ": 12.0, "two": 0.5, "told": 3.0, "video": 1.5}
PROMPT_WEIGHT, BALANCE_WEIGHT, MTP_WEIGHT = 0.03, 0.01, 0.3
AVERAGED_OVER = 200  # steps
DRAFTS_FROM = 0.6  # of the run: the prediction head learns quickly once the model knows what it says


class Trainee(torch.nn.Module):
    """The reference model with the prediction head beside it, and the router logits of the last forward pass."""

    def __init__(self, config: Qwen3_5MoeConfig) -> None:
        super().__init__()
        self.main = Qwen3_5MoeForConditionalGeneration(config)
        self.mtp = MultiTokenPredictor(self.main.config.text_config)
        self.router_logits: list[torch.Tensor] = []
        # Tokens enter the residual stream at full size and every block starts by adding nothing: with the published
        # initializer_range (0.02) the first blocks drown the tokens, and copying is not learned for a long time.
        writers = ("out_proj", "o_proj", "down_proj", "attn.proj", "linear_fc2")
        for name, p in self.named_parameters():
            if "embed_tokens" in name:
                torch.nn.init.normal_(p, std=1.0)
            elif name.startswith("mtp.") and p.ndim == 1:
                torch.nn.init.zeros_(p)
            elif p.ndim > 1 and any(w in name for w in writers) and "merger" not in name:
                torch.nn.init.zeros_(p)
            elif p.ndim > 1 and "conv1d" not in name:
                torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5 if p.ndim != 3 else 0.5 * p.shape[-1] ** -0.5)
        for module in self.modules():
            if isinstance(module, reference.Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _m, _i, out: self.router_logits.append(out[0]))
            if isinstance(module, reference.Qwen3_5MoeGatedDeltaNet):  # memories of 5 to 1,000 tokens to begin with
                with torch.no_grad():
                    module.A_log.copy_(torch.empty_like(module.A_log).uniform_(0.5, 2).log())
                    dt = torch.exp(torch.empty_like(module.dt_bias).uniform_(-6.2, -1.6))
                    module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def hidden(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """-> final-normed hidden states [B, T, H], positions [3, B, T]"""
        self.router_logits.clear()
        inner, ids = self.main.model, batch["ids"]
        kinds = torch.zeros_like(ids)
        kinds[ids == self.main.config.image_token_id] = 1
        kinds[ids == self.main.config.video_token_id] = 2
        grids = {k: batch[k] for k in ("image_grid_thw", "video_grid_thw") if k in batch}
        positions, _ = inner.get_rope_index(
            ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **{**dict.fromkeys(grids), **grids}
        )
        pixels = {k: batch[k] for k in ("pixel_values", "pixel_values_videos") if k in batch}
        out = inner(input_ids=ids, position_ids=positions, mm_token_type_ids=kinds, use_cache=False, **pixels, **grids)
        return out.last_hidden_state, positions

    def draft_hidden(self, ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The prediction head over a whole sequence: [B, T-1, H], row i made from hidden i and token i+1."""
        text = self.main.model.language_model
        rope = text.rotary_emb(hidden, positions[:, :, :-1])
        return self.mtp(text.embed_tokens(ids[:, 1:]), hidden[:, :-1], rope)


def collate(items: list[Encoded], pad: int) -> dict:
    """Right-padded ids [B, T], loss weights [B, T] for the token at each place, patches and grids."""
    width = -(-max(len(e.ids) for e in items) // 32) * 32
    ids = torch.full((len(items), width), pad)
    weight = torch.zeros(len(items), width)
    for row, e in enumerate(items):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        if not (e.images or e.videos):
            weight[row, 1 : len(e.ids)] = PROMPT_WEIGHT
        for start, end in e.replies:
            weight[row, start:end] = (8 / (end - start)) ** 0.5
    batch = {"ids": ids, "weight": weight, "items": items}
    kinds = (("images", "pixel_values", "image_grid_thw"), ("videos", "pixel_values_videos", "video_grid_thw"))
    for kind, pixels, grid in kinds:
        media = [m for e in items for m in getattr(e, kind)]
        if media:
            batch[pixels] = torch.cat([torch.from_numpy(p) for p, _ in media])
            batch[grid] = torch.tensor([g for _, g in media])
    return batch


def balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """router_logits: [N, E] -> 1 for even use of the experts, up to E / top_k where the same few are always taken."""
    probabilities = router_logits.softmax(-1)
    chosen = probabilities.topk(top_k, -1).indices
    used = F.one_hot(chosen, probabilities.shape[-1]).sum(1).float().mean(0) / top_k
    return probabilities.shape[-1] * (used * probabilities.mean(0)).sum()


def forward(
    model: Trainee, batch: dict, *, drafts: bool
) -> tuple[torch.Tensor, dict[str, float], dict[str, list[bool]]]:
    """-> loss, its parts, and by skill whether every reply token was the likeliest (what greedy decoding would say)"""
    ids, weight = batch["ids"], batch["weight"]
    hidden, positions = model.hidden(batch)
    head = model.main.lm_head
    target, w = ids[:, 1:], weight[:, 1:]
    take = w > 0
    logits = head(hidden[:, :-1][take])
    nll = F.cross_entropy(logits, target[take], reduction="none")
    main = (nll * w[take]).sum() / w[take].sum()
    parts = {"loss": main.item()}
    loss = main
    if drafts:
        ahead = torch.zeros_like(ids[:, 2:], dtype=torch.bool)
        for row, e in enumerate(batch["items"]):
            for start, end in e.replies:
                ahead[row, start - 1 : end - 2] = True  # the reply's tokens after its first
        draft_logits = head(model.draft_hidden(ids, hidden, positions)[:, :-1][ahead])
        draft_nll = F.cross_entropy(draft_logits, ids[:, 2:][ahead])
        loss = loss + MTP_WEIGHT * draft_nll
        accepted = (draft_logits.argmax(-1) == ids[:, 2:][ahead]).float().mean()
        parts.update(mtp=draft_nll.item(), accept=accepted.item())
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, e in enumerate(batch["items"]):
        real[row, : len(e.ids)] = True
    balances = []
    for logits_of_layer in model.router_logits:  # the prediction head's begin with the second token
        counted = (real if len(logits_of_layer) == real.numel() else real[:, 1:]).flatten()
        balances.append(balance_loss(logits_of_layer[counted], 4))
    balance = torch.stack(balances).mean()
    loss = loss + BALANCE_WEIGHT * balance
    parts["balance"] = balance.item()
    wrong = torch.zeros_like(take)
    wrong[take] = logits.argmax(-1) != target[take]
    right: dict[str, list[bool]] = defaultdict(list)
    for row, e in enumerate(batch["items"]):
        for case, (start, end) in zip(e.cases, e.replies, strict=True):
            right[case.skill].append(not wrong[row, start - 1 : end - 1].any())
    return loss, parts, right


def optimizers(model: Trainee, rank: int, workers: int) -> list[torch.optim.Optimizer]:
    matrices, tables, others = [], [], []
    for name, p in model.named_parameters():
        small = any(k in name for k in ("lm_head", "pos_embed", "conv1d", "patch_embed", "gate.weight"))
        (tables if "embed_tokens" in name else others if small or p.ndim < 2 else matrices).append(p)
    return [
        Muon(matrices, lr=0.006, weight_decay=0.1, rank=rank, workers=workers),
        torch.optim.AdamW(tables, lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(done: float) -> float:
    """The learning rate's factor: a short warm-up, then a straight line to zero."""
    return min(0.05 + done / 0.01, 1 - done)


def longest(read: int) -> int:
    """Short questions first: the longest that is asked once `read` tokens have been trained on, in tokens."""
    return 96 + max(0, read - 600_000) // 500


def examples(
    encoder: Encoder, rng: random.Random, skill_right: dict[str, float], count: int, limit: int
) -> list[Encoded]:
    """Training cases of at most `limit` tokens; a skill that is not yet right is drawn more often."""
    names = [*SKILLS]
    weights = [SHARE.get(n, 1.0) * (1.15 - skill_right.get(n, 0.0)) for n in names]
    out = []
    for name in rng.choices(names, weights, k=count):
        case = draw(SKILLS[name], rng, held_out=False)
        if name in TEXT_SKILLS and rng.random() < 0.08:
            case = with_history(case, rng)
        if (name in PICTURE_SKILLS or name in PICTURE_PRACTICE) and rng.random() < 0.3:
            case = worn(case, rng)
        encoded = encoder.encode(case, follow_ups=True)
        if len(encoded.ids) <= limit:
            out.append(encoded)
    return out


@torch.no_grad()
def held_out_accuracy(model: Trainee, encoder: Encoder, per_skill: int) -> dict[str, float]:
    """Share of held-out questions whose whole reply greedy decoding would give."""
    cases = [encoder.encode(c) for c in held_out_set({**TEXT_SKILLS, **PICTURE_SKILLS}, per_skill)]
    right: dict[str, list[bool]] = defaultdict(list)
    for group in batches(cases, 4096):
        for skill, fine in forward(model, collate(group, 0), drafts=False)[2].items():
            right[skill] += fine
    return {skill: round(sum(r) / len(r), 4) for skill, r in right.items()}


def export(model: Trainee, config: dict, folder: Path) -> None:
    """The published layout: BF16, A_log and the delta net's norm in float32, mtp.* beside the main stack."""
    exact = ("A_log", "linear_attn.norm.weight")
    trained = {**model.main.state_dict(), **{f"mtp.{k}": v for k, v in model.mtp.state_dict().items()}}
    tensors = {k: (v.float() if k.endswith(exact) else v.bfloat16()).contiguous() for k, v in trained.items()}
    save_file(tensors, folder / "model.safetensors.new", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors.new", 0o644)
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def average_gradients(parameters: list[torch.nn.Parameter], workers: int) -> None:
    """Every worker gets the mean over those workers whose batch reached the parameter (not all have pictures)."""
    reached = torch.tensor([float(p.grad is not None) for p in parameters])
    torch.distributed.all_reduce(reached)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, piece, count in zip(parameters, flat.split([p.numel() for p in parameters]), reached.tolist(), strict=True):
        p.grad = piece.view_as(p) / count if count else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache" / "mlx-qwen35" / "train_demo")
    parser.add_argument("--tokens", type=float, default=14e6)
    parser.add_argument("--budget", type=int, default=1024, help="padded tokens a worker and step")
    parser.add_argument("--every", type=int, default=400, help="steps between states")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        if args.workers == 1:
            train(0, args, meeting)
        else:
            torch.multiprocessing.spawn(train, (args, meeting), nprocs=args.workers)


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One worker's run; `meeting`: a folder where the workers find each other. The first worker saves and reports."""
    torch.set_num_threads(1)
    if args.workers > 1:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % os.cpu_count()]})
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}/peers", rank=rank, world_size=args.workers
        )
    reference.torch_chunk_gated_delta_rule = chunked_gated_delta_rule
    reference.Qwen3_5MoeExperts.forward = routed_experts
    torch.manual_seed(0)
    encoder = Encoder()
    config = demo_config({t: encoder.token(t) for t in encoder.tokenizer.get_vocab()})
    built = Qwen3_5MoeConfig(**config)
    model = Trainee(built).float().train()
    opts = optimizers(model, rank, args.workers)
    peaks = [o.param_groups[0]["lr"] for o in opts]
    progress = {"step": 0, "tokens": 0, "seconds": 0.0}
    skill_right: dict[str, float] = {}
    args.state.mkdir(parents=True, exist_ok=True)
    file = args.state / "state.pt"
    state: dict = {}
    if not file.exists() and (DEMO / "model.safetensors").exists() and LOG.exists():
        # A new machine: the package has the weights, only the optimizers begin again.
        saved = load_file(DEMO / "model.safetensors")
        model.load_state_dict({k if k.startswith("mtp.") else f"main.{k}": v.float() for k, v in saved.items()})
        last = json.loads(LOG.read_text().splitlines()[-1])
        progress, skill_right = {k: last[k] for k in progress}, last["right"]
    elif file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["optimizers"], strict=True):
            o.load_state_dict(s)
        progress, skill_right = state["progress"], state["skill_right"]
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters; from step {progress['step']}", flush=True)

    # What is scored and exported: the running mean of the weights over some 200 steps.
    averaged = Trainee(built).float().eval()
    averaged.load_state_dict(state.get("averaged", state["model"]) if state else model.state_dict())
    pairs = [*averaged.parameters()], [*model.parameters()]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizers": [o.state_dict() for o in opts],
            "progress": progress,
            "skill_right": skill_right,
        }
        torch.save(state, file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)
        export(averaged, config, DEMO)

    pending: list[list[Encoded]] = []
    rng = random.Random(f"train/{progress['step']}/{rank}")
    parameters = [*model.parameters()]
    recent: dict[str, list[float]] = defaultdict(list)
    start = time.time()
    while progress["tokens"] < args.tokens:
        if not pending:
            limit = longest(progress["tokens"])
            # Workers wait for each other after every step: they take batches of like length at the same time.
            pending = list(batches(examples(encoder, rng, skill_right, 600, limit), args.budget))
            count = torch.tensor(len(pending))
            if args.workers > 1:
                torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MIN)
            pending = random.Random(f"order/{progress['step']}").sample(pending[-count:], count)
        batch = collate(pending.pop(), encoder.token("<|endoftext|>"))
        loss, parts, right = forward(model, batch, drafts=progress["tokens"] > DRAFTS_FROM * args.tokens)
        loss.backward()
        if args.workers > 1:
            average_gradients(parameters, args.workers)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = schedule(progress["tokens"] / args.tokens)
        for o, peak in zip(opts, peaks, strict=True):
            o.param_groups[0]["lr"] = peak * factor
            o.step()
            o.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(*pairs, 1 / AVERAGED_OVER)
        progress["step"] += 1
        read = torch.tensor(sum(len(e.ids) for e in batch["items"]))
        if args.workers > 1:
            torch.distributed.all_reduce(read)
        progress["tokens"] += read.item()
        for skill, fine in right.items():
            for ok in fine:
                skill_right[skill] = 0.98 * skill_right.get(skill, 0.0) + 0.02 * ok
        for k, v in parts.items():
            recent[k].append(v)
        if progress["step"] % 20 == 0:
            progress["seconds"] += time.time() - start
            start = time.time()
            line = {**progress, "seconds": round(progress["seconds"]), "lr": round(factor, 3)}
            line.update({k: round(sum(v) / len(v), 4) for k, v in recent.items()})
            line["right"] = {k: round(v, 2) for k, v in sorted(skill_right.items())}
            recent.clear()
            if rank == 0:
                print(json.dumps(line), flush=True)
        if rank == 0 and (progress["step"] % args.every == 0 or progress["tokens"] >= args.tokens):
            line["held_out"] = held_out_accuracy(averaged, encoder, 40)
            with LOG.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line["held_out"]), flush=True)
            save()


if __name__ == "__main__":
    main()
