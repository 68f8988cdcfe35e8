"""What every tensor is called in each published layout, and in ours.

Knows names only: no files, no shapes, no values. A checkpoint has one layout, found once from its marker (the
safetensors metadata "format") and its names; nothing is decided tensor by tensor, nor by shapes.

    layout      text model               head                     vision           routed experts
    HF          model.language_model.*   lm_head.*                model.visual.*   mlp.experts.gate_up_proj (fused)
    HF, text    model.*                  lm_head.*                                 or mlp.experts.{e}.gate_proj.weight
    MLX         language_model.model.*   language_model.lm_head.* vision_tower.*   mlp.switch_mlp.gate_proj.weight
    MLX, text   model.*                  lm_head.*                                 the same
    ours        *                        lm_head.*                vision.*         mlp.experts.gate_proj.weight

MTP tensors are mtp.* everywhere. Values differ as well: HF stores the norms zero-centred (the scale is 1 + w) and its
convolutions channels first; MLX, like us, stores the scale itself and convolutions channels last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_qwen35.errors import CheckpointError

HF, MLX = "hf", "mlx"
FUSED, SEPARATE, STACKED = "fused", "separate", "stacked"

# The value of "format" in a safetensors file's metadata, by the layout that it marks.
_MARKERS = {"mlx": MLX, "pt": HF, "tf": HF, "flax": HF, "np": HF}
# Text prefixes, longest first: "model." also begins the first.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")

_DECODER_LAYER = (
    r"(input_layernorm|post_attention_layernorm)\.weight"
    r"|self_attn\.(q_proj|k_proj|v_proj|o_proj|q_norm|k_norm)\.weight"
    r"|linear_attn\.(in_proj_qkv|in_proj_z|in_proj_a|in_proj_b|out_proj|conv1d|norm)\.weight|linear_attn\.(A_log|dt_bias)"
    r"|mlp\.((shared_expert\.)?(gate_proj|up_proj|down_proj)|gate|shared_expert_gate)\.weight"
    r"|mlp\.experts\.((gate_up_proj|down_proj)|\d+\.(gate_proj|up_proj|down_proj)\.weight)"
    r"|mlp\.switch_mlp\.(gate_proj|up_proj|down_proj)\.weight"
)
_MTP = re.compile(
    rf"mtp\.((fc|norm|pre_fc_norm_embedding|pre_fc_norm_hidden)\.weight|layers\.\d+\.({_DECODER_LAYER}))"
)
_VISION = re.compile(
    r"(patch_embed\.proj|merger\.(norm|linear_fc1|linear_fc2)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.linear_fc1|mlp\.linear_fc2))\.(weight|bias)"
    r"|pos_embed\.weight"
)
_QUANTIZED = re.compile(r"\.(scales|biases)$")
_MAIN_EXPERT = re.compile(r"(.*layers\.\d+\.mlp\.)(experts|switch_mlp)\.(.+)")
_OUR_EXPERT = re.compile(r"(.*mlp\.)experts\.(gate_proj|up_proj|down_proj)\.(weight|scales|biases)")
_SHIFTED = re.compile(
    r"norm\.weight|layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm)\.weight"
    r"|mtp\.(norm|pre_fc_norm_embedding|pre_fc_norm_hidden|layers\.\d+\."
    r"(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm))\.weight"
)


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: a published tensor, half of one, or one per expert to be stacked.

    half: 0 for the gate rows, 1 for the up rows of a fused [E, 2M, H] tensor; None for the whole.
    stacked: `names` are the E rows of axis 0 of ours.
    """

    names: tuple[str, ...]
    half: int | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Layout:
    """The names of one checkpoint. kind: "hf" or "mlx". experts, mtp_experts: "fused", "separate" or "stacked"."""

    kind: str
    text: str
    head: str
    vision: str
    experts: str
    mtp_experts: str

    @property
    def label(self) -> str:
        """The layout in words, for errors."""
        return f"{'Hugging Face' if self.kind == HF else 'MLX'} ({self.text}*)"

    def source(self, ours: str, experts: int = 0) -> Source:
        """The published tensor or tensors that hold `ours`; `experts` is their number where they are separate."""
        found = _OUR_EXPERT.fullmatch(ours)
        if not found:
            return Source((self._published(ours),))
        stem, projection, kind = found.groups()
        stem = self._published(stem)
        how = self.mtp_experts if ours.startswith("mtp.") else self.experts
        if how == STACKED:
            return Source((f"{stem}switch_mlp.{projection}.{kind}",))
        if how == SEPARATE:
            return Source(tuple(f"{stem}experts.{e}.{projection}.{kind}" for e in range(experts)), stacked=True)
        if projection == "down_proj":
            return Source((f"{stem}experts.down_proj",))
        return Source((f"{stem}experts.gate_up_proj",), half=("gate_proj", "up_proj").index(projection))

    def ours(self, published: str) -> tuple[str, ...]:
        """Our names for what a published tensor holds (two for a fused one), () where it is none of this layout's."""
        if published.startswith(self.vision):
            return ("vision." + published.removeprefix(self.vision),) if self.is_known(published) else ()
        for theirs, prefix in ((self.head, "lm_head."), ("mtp.", "mtp."), (self.text, "")):
            if published.startswith(theirs):
                name = prefix + published.removeprefix(theirs)
                break
        else:
            return ()
        found = _MAIN_EXPERT.fullmatch(name)
        if not found:
            return (name,)
        stem, _, rest = found.groups()
        if rest == "gate_up_proj":
            return (f"{stem}experts.gate_proj.weight", f"{stem}experts.up_proj.weight")
        if rest == "down_proj":
            return (f"{stem}experts.down_proj.weight",)
        return (f"{stem}experts." + re.sub(r"^\d+\.", "", rest),)

    def is_known(self, published: str) -> bool:
        """Whether the name is a vision or MTP tensor of this layout: parts that may be there without being read."""
        name = _QUANTIZED.sub(".weight", published) if self.kind == MLX else published.removesuffix("_scale_inv")
        if name.startswith(self.vision):
            return bool(_VISION.fullmatch(name.removeprefix(self.vision)))
        return bool(_MTP.fullmatch(name))

    def axes(self, ours: str) -> tuple[int, ...] | None:
        """How to transpose the published tensor into our [C, K, 1] or [V, T, P, P, C]; None where it is already so."""
        if self.kind == MLX:
            return None
        if ours.endswith("linear_attn.conv1d.weight"):
            return (0, 2, 1)  # [C, 1, K] -> [C, K, 1]
        if ours == "vision.patch_embed.proj.weight":
            return (0, 2, 3, 4, 1)  # [V, C, T, P, P] -> [V, T, P, P, C]
        return None

    def is_shifted(self, ours: str) -> bool:
        """Whether the published value of this norm lacks the 1 that ours holds."""
        return self.kind == HF and bool(_SHIFTED.fullmatch(ours))

    def _published(self, ours: str) -> str:
        for prefix, theirs in (("lm_head.", self.head), ("vision.", self.vision), ("mtp.", "mtp.")):
            if ours.startswith(prefix):
                return theirs + ours.removeprefix(prefix)
        return self.text + ours


# How a written checkpoint names its tensors.
TARGET = Layout(MLX, "language_model.model.", "language_model.lm_head.", "vision_tower.", STACKED, STACKED)


def find_layout(names: Iterable[str], formats: Iterable[str | None], where: str) -> Layout:
    """The layout of a checkpoint from all its tensor names and the "format" of every file (None where unmarked).

    Raises CheckpointError if markers or names contradict each other; `where` names the checkpoint in errors.
    """
    names = sorted(names)
    # .scales is MLX's name for a tensor, and GPTQ's for one beside these.
    packed = {name.rpartition(".")[0] for name in names if name.endswith((".qweight", ".qzeros"))}
    marked = _marked(formats, where)
    evidence: dict[str, str] = {}  # layout -> the first name that only this layout has
    for name in names:
        kind = None if name.removesuffix(".scales") in packed else _kind_of(name)
        if kind:
            evidence.setdefault(kind, name)
    if len(evidence) > 1:
        raise CheckpointError(
            f"{where} mixes two layouts: {evidence[HF]} is a Hugging Face name, {evidence[MLX]} an MLX one. "
            "Files of two checkpoints lie in one folder: keep those of one"
        )
    named = next(iter(evidence), None)
    if marked and named and marked != named:
        raise CheckpointError(
            f"{where}: the files' metadata says format {'mlx' if marked == MLX else 'pt'!r}, but {evidence[named]} is "
            f"{'an MLX' if named == MLX else 'a Hugging Face'} name, so it is unclear whether the norms are shifted. "
            "Convert the original checkpoint again"
        )
    kind = marked or named
    if kind is None:
        # Plain model.* names without a marker: HF's, if the loader can check it by the convolution's strict shape.
        if not any(name.endswith("conv1d.weight") for name in names):
            raise CheckpointError(
                f"{where}: neither metadata nor names say whether this is a Hugging Face or an MLX checkpoint. "
                'Write the files again with the metadata {"format": "pt"} or {"format": "mlx"}'
            )
        kind = HF
    text = _text_prefix(names, where)
    roofed = kind == MLX and text == "language_model.model."
    return Layout(
        kind=kind,
        text=text,
        head="language_model.lm_head." if roofed else "lm_head.",
        vision="vision_tower." if kind == MLX else "model.visual.",
        experts=_experts((n for n in names if not n.startswith("mtp.")), kind, where),
        mtp_experts=_experts((n for n in names if n.startswith("mtp.")), kind, where),
    )


def _marked(formats: Iterable[str | None], where: str) -> str | None:
    found = sorted({f for f in formats if f is not None})
    for marker in found:
        if marker not in _MARKERS:
            raise CheckpointError(
                f"{where}: the files' metadata says format {marker!r:.40}, which is none of {', '.join(_MARKERS)}. "
                "Download the files again, or convert the original checkpoint again"
            )
    kinds = {_MARKERS[f] for f in found}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{where}: some files are marked {found[0]!r} and some {found[-1]!r} in their metadata. "
            "Files of two checkpoints lie in one folder: keep those of one"
        )
    return next(iter(kinds), None)


def _kind_of(name: str) -> str | None:
    """The only layout in which a tensor can have this name; None where both have it."""
    if name.startswith("mtp."):
        return None
    if name.startswith(("language_model.", "vision_tower.")) or ".mlp.switch_mlp." in name or _QUANTIZED.search(name):
        return MLX
    if name.startswith(("model.language_model.", "model.visual.")) or ".mlp.experts." in name:
        return HF
    return None


def _text_prefix(names: list[str], where: str) -> str:
    found: dict[str, str] = {}
    for name in names:
        prefix = next((p for p in _TEXT_PREFIXES if name.startswith(p)), None)
        if prefix and not name.startswith("model.visual."):
            found.setdefault(prefix, name)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise CheckpointError(
            f"{where} mixes two ways of naming: {first} and {second}. "
            "Files of two checkpoints lie in one folder: keep those of one"
        )
    if not found:
        raise CheckpointError(
            f"{where} holds no tensor of a text model ({', '.join(p + '*' for p in _TEXT_PREFIXES)}): "
            "is this the folder of a Qwen3.5 checkpoint?"
        )
    return next(iter(found))


def _experts(names: Iterable[str], kind: str, where: str) -> str:
    found: dict[str, str] = {}
    for name in names:
        match = _MAIN_EXPERT.fullmatch(name)
        if match:
            how = STACKED if match[2] == "switch_mlp" else SEPARATE if match[3][0].isdigit() else FUSED
            found.setdefault(how, name)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise CheckpointError(
            f"{where} mixes two layouts of experts: {first} and {second}. "
            "Files of two checkpoints lie in one folder: keep those of one"
        )
    return next(iter(found), STACKED if kind == MLX else FUSED)
