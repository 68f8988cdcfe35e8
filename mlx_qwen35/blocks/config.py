"""What config.json of a block drafter says: its kind, its geometry, and which layers of its target it reads.

Knows keys and numbers. Published drafters call themselves "qwen3", whatever they are: the kind is told by
`architectures` and by the keys of `dflash_config`. A DFlash2 that is read as a DFlash would load, and draft worse, so
that a key which is not known is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.config.fields import Fields
from mlx_qwen35.config.quantization import Quantization, read_quantization
from mlx_qwen35.errors import CheckpointError

DFLASH, DFLASH2 = "DFlash", "DFlash2"
KINDS = {"DFlashDraftModel": DFLASH, "DFlash2DraftModel": DFLASH2}
MOST_ROWS = 32  # of a block

_SECTION = "dflash_config"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_SELECTING = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_KNOWN = {
    "block_size", "runtime_block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "causal",
    "attention_sink_bias", "draft_window_size", "final_logit_softcapping", "input_embedding_scale",
    "output_multiplier", *_SELECTING,
}  # fmt: skip
# Keys by which drafters of other kinds are known, wherever they stand.
_OTHERS = {
    "DSpark": ("projector_type", "markov_rank", "markov_head_type", "enable_confidence_head", "sample_from_anchor"),
    "DFly": ("layer_fusion",),
}
_USUAL_ROWS = 8  # of a block, where config.json does not say how many pay


@dataclass(frozen=True)
class BlockConfig:
    """A block drafter's geometry. kind: DFLASH or DFLASH2.

    windows: of each layer, how many positions of the context it reads; None: all. rows: of a block, the token that is
    known among them; usual_rows: of those, how many to take where nobody says. mask: the token of a row that is to be
    guessed. taps: the layers of the target whose outputs are read, from 0. target_layers: that it has. causal: whether
    a row sees only those before it. sinks: whether each head has a logit for nothing. convolution: (length, channels
    of a group), and selector: (rank, candidates) of a DFlash2. softcap, input_scale, output_scale: of the logits, the
    embeddings and the logits.
    """

    kind: str
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    rope_theta: float
    windows: tuple[int | None, ...]
    rows: int
    usual_rows: int
    mask: int
    taps: tuple[int, ...]
    target_layers: int
    causal: bool = False
    sinks: bool = False
    convolution: tuple[int, int] | None = None
    selector: tuple[int, int] | None = None
    softcap: float | None = None
    input_scale: float = 1.0
    output_scale: float = 1.0
    quantization: Quantization | None = None

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def reach(self) -> int | None:
        """Positions of the context that any layer reads; None: all."""
        return None if None in self.windows else max(self.windows)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> BlockConfig:
        """where: names the file in errors. Raises CheckpointError for what this package does not compute."""
        top = Fields(raw, where)
        section = top.section(_SECTION) or Fields({}, where, f"{_SECTION}.")
        kind = _kind(top, section)
        both = Fields({**raw, **section.values}, where)  # what the section says goes first
        top.only("model_type", "qwen3", "dflash", "dflash2", "qwen3_dflash")
        top.only("hidden_act", "silu")
        top.only("attention_bias", False)
        top.only("rope_is_neox_style", True)
        theta = _theta(top)
        vocab = top.size("vocab_size")
        top.only("draft_vocab_size", vocab)
        heads, kv_heads, dim = (top.size(k) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        if heads % kv_heads or dim % 2:
            raise top.fail("num_attention_heads", f"is {heads}, of {dim} each, for {kv_heads} heads of keys and values")
        rows = both.size("block_size", least=2, most=MOST_ROWS)
        usual = both.size("runtime_block_size", least=2, most=rows) if both.has("runtime_block_size") else None
        taps = _taps(both)
        layers = both.size("num_target_layers") if both.has("num_target_layers") else max(taps) + 1
        if max(taps) >= layers:
            raise both.fail("target_layer_ids", f"names layer {max(taps)} of a model of {layers}")
        hidden = top.size("hidden_size")
        causal = section.flag("causal", both.flag("dflash_query_causal", top.flag("is_causal", False)))
        return cls(
            kind=kind,
            hidden_size=hidden,
            intermediate_size=top.size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            vocab_size=vocab,
            eps=top.number("rms_norm_eps"),
            rope_theta=theta,
            windows=_windows(top, both),
            rows=rows,
            usual_rows=min(rows, _USUAL_ROWS) if usual is None else usual,
            mask=both.size("mask_token_id", least=0, most=vocab - 1),
            taps=taps,
            target_layers=layers,
            causal=causal,
            sinks=both.flag("attention_sink_bias", False),
            softcap=both.number("final_logit_softcapping") if both.has("final_logit_softcapping") else None,
            quantization=read_quantization(top, section)[0],
            **(_selecting(both, hidden, vocab, causal) if kind == DFLASH2 else {}),
        )

    def check(self, target: ModelConfig, where: str) -> None:
        """Raises CheckpointError if this, that of `where`, drafts for another model than `target`."""
        text = target.text
        named = (
            ("channels", self.hidden_size, text.hidden_size),
            ("tokens", self.vocab_size, text.vocab_size),
            ("layers", self.target_layers, len(text.layer_types)),
        )
        wrong = [f"{own} {name} where it has {theirs}" for name, own, theirs in named if own != theirs]
        if wrong:
            raise CheckpointError(
                f"{where} does not draft for this model: it is for {', '.join(wrong)}. Take the {self.kind} drafter "
                "that was made for this model"
            )


def is_block_drafter(raw: Any) -> bool:
    """Whether a config.json is that of a block drafter, of a kind that is read or of another."""
    if not isinstance(raw, Mapping):
        return False
    named = raw.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return isinstance(raw.get(_SECTION), Mapping) or any(
        name in KINDS or any(other.lower() in name.lower() for other in _OTHERS) for name in names
    )


def _kind(top: Fields, section: Fields) -> str:
    """The kind, in which names and keys have to agree."""
    named = top.values.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for other, keys in _OTHERS.items():
        key = next((key for key in keys if key in section.values or key in top.values), None)
        name = next((name for name in names if other.lower() in name.lower()), None)
        if key or name:
            raise top.fail(
                key or "architectures",
                f"is that of a {other} drafter, which this package does not compute: take a DFlash or DFlash2 drafter "
                "of the same model, or leave it out",
            )
    selecting = [key for key in _SELECTING if section.has(key) or top.has(key)]
    kinds = {KINDS[name] for name in names if name in KINDS} or {DFLASH2 if selecting else DFLASH}
    if len(kinds) > 1 or (names and not any(name in KINDS for name in names)):
        raise top.fail("architectures", f"is {names}; this package computes {' and '.join(KINDS)}")
    (kind,) = kinds
    if kind == DFLASH and selecting:
        raise section.fail(selecting[0], f"belongs to a {DFLASH2}, and architectures says {names[0]}: one is wrong")
    if not section.values:
        raise top.fail(_SECTION, "is missing: this does not look like the config.json of a DFlash drafter")
    unknown = sorted(section.values.keys() - _KNOWN)
    if unknown:
        raise section.fail(
            unknown[0],
            "is not known to this package, and without it the drafter may draft worse: take a newer version, or "
            "another drafter",
        )
    return kind


def _theta(top: Fields) -> float:
    """Of rotary positions, which turn all of a head; only as published."""
    for key in ("rope_parameters", "rope_scaling"):
        section = top.section(key)
        if section is not None:
            section.only("rope_type", "default")
            section.only("type", "default")
            section.only("partial_rotary_factor", 1, 1.0)
            if section.has("rope_theta"):
                return section.number("rope_theta")
    return top.number("rope_theta")


def _taps(both: Fields) -> tuple[int, ...]:
    found = both.tokens("target_layer_ids")
    if not found or len(set(found)) < len(found):
        raise both.fail("target_layer_ids", f"is {list(found)}; it must name layers of the target, each once")
    return found


def _windows(top: Fields, both: Fields) -> tuple[int | None, ...]:
    layers, kinds = top.size("num_hidden_layers", most=1024), top.values.get("layer_types")
    kinds = [_FULL] * layers if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != layers or not {_FULL, _SLIDING}.issuperset(map(str, kinds)):
        raise top.fail("layer_types", f"must name {_FULL} or {_SLIDING} for each of {layers} layers")
    bound = both.size("draft_window_size") if both.has("draft_window_size") else None
    # A sliding window of N holds the position itself and N - 1 before it.
    sliding = top.size("sliding_window", least=2) - 1 if _SLIDING in kinds else None
    each = [sliding if kind == _SLIDING else None for kind in kinds]
    return tuple(bound if own is None else own if bound is None else min(own, bound) for own in each)


def _selecting(both: Fields, hidden: int, vocab: int, causal: bool) -> dict[str, Any]:
    """What a DFlash2 has beside a DFlash."""
    length, group, rank, candidates = (both.size(key) for key in _SELECTING)
    if hidden % group:
        raise both.fail("conv_group_size", f"is {group}, which does not divide hidden_size {hidden}")
    if candidates > vocab:
        raise both.fail("selector_top_k", f"is {candidates}, of {vocab} tokens")
    if causal:
        raise both.fail("causal", f"is true, which a {DFLASH2} is not")
    scales = {"input_scale": "input_embedding_scale", "output_scale": "output_multiplier"}
    return {
        "convolution": (length, group),
        "selector": (rank, candidates),
        **{ours: both.number(key) for ours, key in scales.items() if both.has(key)},
    }
