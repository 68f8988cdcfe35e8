"""What every tensor is called in each published layout, and in ours; and which layout a checkpoint has.

Knows names, and the shapes of convolutions where they tell who wrote a file: no values, no other shapes. How names are
written and how values are written are two questions, each with one answer for a whole checkpoint.

    names       text model               head                     vision           routed experts
    HF          model.language_model.*   lm_head.*                model.visual.*   mlp.experts.gate_up_proj (fused)
    HF, text    model.*                  lm_head.*                                 or mlp.experts.{e}.gate_proj.weight
    MLX         language_model.model.*   language_model.lm_head.* vision_tower.*   mlp.switch_mlp.gate_proj.weight
    MLX, text   model.*                  lm_head.*                                 the same
    ours        *                        lm_head.*                vision.*         mlp.experts.gate_proj.weight

Parts may be named by another rule than the rest: head, vision tower and experts are looked for under all these names.
MTP tensors are mtp.*, or the same under a roof (language_model.mtp.*).

Values: HF stores the norms zero-centred (the scale is 1 + w) and its convolutions channels first; MLX, like us, stores
the scale itself and convolutions channels last. Writers change both together, so the order of the convolutions tells
about the norms; a convolution's own shape tells about itself.
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
# Longest first: "model." begins others too.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HEADS = ("model.language_model.lm_head.", "language_model.lm_head.", "model.lm_head.", "lm_head.")
TOWERS = ("model.vision_tower.", "model.visual.", "vision_tower.", "visual.")
MTP_PREFIXES = ("model.language_model.mtp.", "language_model.mtp.", "model.mtp.", "mtp.")
_ROOTS = ((TOWERS, "vision."), (MTP_PREFIXES, "mtp."), (_HEADS, "lm_head."), ((*_TEXT_PREFIXES, "language_model."), ""))

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
_PACKED = re.compile(r"\.(scales|biases)$")
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
    """The names of one checkpoint, and how its values are written.

    kind, values, mtp_values: "hf" or "mlx"; kind is of names. experts, mtp_experts: "fused", "separate" or "stacked".
    packed: whether MLX quantized anything. endings: what names of tensors that another tool quantized have in place of
    ".weight", or behind the whole name. doubt: what speaks against `values`, in words; "": nothing.
    """

    kind: str
    text: str
    head: str
    vision: str
    experts: str
    mtp_experts: str
    values: str
    mtp_values: str
    mtp: str = "mtp."
    packed: bool = False
    endings: tuple[str, ...] = ()
    doubt: str = ""

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
        for theirs, prefix in ((self.head, "lm_head."), (self.mtp, "mtp."), (self.text, "")):
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
        name = weight_of(published, self.endings)
        if self.is_mtp(published):
            name = "mtp." + name.removeprefix(self.mtp)
        if self.kind == MLX or self.packed:
            name = _PACKED.sub(".weight", name)
        if name.startswith(self.vision):
            return bool(_VISION.fullmatch(name.removeprefix(self.vision)))
        return bool(_MTP.fullmatch(name))

    def is_mtp(self, published: str) -> bool:
        """Whether the name is one of the MTP layer's."""
        return published.startswith(self.mtp)

    def axes(self, ours: str, shape: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        """How to transpose a published tensor into our [C, K, 1] or [V, T, P, P, C]; None where it is already so.

        shape: the published one. Without it, or where it could be either, as the values of the checkpoint are written.
        """
        if ours.endswith("linear_attn.conv1d.weight"):
            first = self.values == HF if shape is None else _channels_first(shape)
            return (0, 2, 1) if (self.values == HF if first is None else first) else None  # [C, 1, K] -> [C, K, 1]
        if ours == "vision.patch_embed.proj.weight":
            first = self.values == HF
            if shape is not None and len(shape) == 5 and (shape[2] == shape[3]) != (shape[3] == shape[4]):
                first = shape[3] == shape[4]
            return (0, 2, 3, 4, 1) if first else None  # [V, C, T, P, P] -> [V, T, P, P, C]
        return None

    def is_shifted(self, ours: str) -> bool:
        """Whether the published value of this norm lacks the 1 that ours holds."""
        return (self.mtp_values if ours.startswith("mtp.") else self.values) == HF and is_centred(ours)

    def _published(self, ours: str) -> str:
        for prefix, theirs in (("lm_head.", self.head), ("vision.", self.vision), ("mtp.", self.mtp)):
            if ours.startswith(prefix):
                return theirs + ours.removeprefix(prefix)
        return self.text + ours


# How a written checkpoint names its tensors.
TARGET = Layout(
    MLX, "language_model.model.", "language_model.lm_head.", "vision_tower.", STACKED, STACKED, MLX, MLX, packed=True
)


def weight_of(name: str, endings: Iterable[str]) -> str:
    """What a tensor would be called if its module were not quantized. endings: as a Layout has them."""
    for ending in endings:
        if name.endswith(ending):
            return name.removesuffix(ending) + (".weight" if ending.startswith(".") else "")
    return name


def is_mtp(name: str, endings: Iterable[str] = ()) -> bool:
    """Whether a name that begins with mtp. is one of an MTP layer, in any layout, packed or not."""
    return bool(_MTP.fullmatch(_PACKED.sub(".weight", weight_of(name, endings))))


def is_centred(ours: str) -> bool:
    """Whether one of our tensors is a norm that Hugging Face stores zero-centred."""
    return bool(_SHIFTED.fullmatch(ours))


def bare(path: str) -> str:
    """Our name for the module at a path, whatever the layout that spells it: what entries of config.json are held by.

    An expert of its own number stays one: layers.0.mlp.experts.7.up_proj.
    """
    name = f"{path}."
    for prefixes, ours in _ROOTS:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix:
            name = ours + name.removeprefix(prefix)
            break
    return name.removesuffix(".").replace(".mlp.switch_mlp.", ".mlp.experts.")


def find_layout(
    names: Iterable[str],
    formats: Iterable[str | None],
    where: str,
    convolutions: Iterable[tuple[int, ...]] = (),
    endings: tuple[str, ...] = (),
) -> Layout:
    """The layout of a checkpoint from all its tensor names, the "format" of every file (None where unmarked), and the
    shapes of the text model's convolutions. endings: as a Layout has them.

    The order of the convolutions decides how values are written; marker and names do where it says nothing, and then
    have to agree. `doubt` of the result says what contradicts: the norms' values have to confirm it (norms.py).
    Raises CheckpointError if one of these contradicts itself; `where` names the checkpoint in errors.
    """
    names = sorted(names)
    marked = _marked(formats, where)
    mtp = _one_of(MTP_PREFIXES, names, "MTP layer", where) or "mtp."
    text = _text_prefix(names, where)
    head = _one_of(_HEADS, names, "head", where)
    vision = _one_of(TOWERS, names, "vision tower", where)
    packed = _is_packed(names)
    main = [name for name in names if not name.startswith(mtp)]
    named = _named(text, vision, main)
    order = _order(convolutions, where)
    values = order or _agreed(marked, named, packed, main, where)
    against = [
        f"{said} of {'MLX' if kind == MLX else 'Hugging Face'}"
        for kind, said in ((marked, "the files' metadata speaks"), (named, f"the name {main[0]} is one"))
        if kind not in (None, values)
    ]
    if not (order or marked or named):
        against = ["neither metadata nor names nor the order of convolutions say who wrote it"]
    kind = named or marked or values
    roofed = kind == MLX and text == "language_model.model."
    return Layout(
        kind=kind,
        text=text,
        head=head or ("language_model.lm_head." if roofed else "lm_head."),
        vision=vision or ("vision_tower." if kind == MLX else "model.visual."),
        experts=_experts(main, kind, where),
        mtp_experts=_experts((n for n in names if n.startswith(mtp)), kind, where),
        values=values,
        mtp_values=values,
        mtp=mtp,
        packed=packed,
        endings=endings,
        doubt=" and ".join(against),
    )


def head_layout(names: Iterable[str], values: str, where: str, endings: tuple[str, ...] = ()) -> Layout:
    """The layout of an MTP head that lies by itself, under names mtp.*, with values as `values` says."""
    names = list(names)
    packed = _is_packed(names)
    experts = _experts(names, HF, where)
    return Layout(
        HF, "model.", "lm_head.", "model.visual.", experts, experts, values, values, packed=packed, endings=endings
    )


def _channels_first(shape: tuple[int, ...]) -> bool | None:
    """Whether a convolution is [C, 1, K] and not [C, K, 1]; None where it could be either, or neither."""
    if len(shape) != 3 or (shape[1] == 1) == (shape[2] == 1):
        return None
    return shape[1] == 1


def _order(convolutions: Iterable[tuple[int, ...]], where: str) -> str | None:
    found = {first: shape for shape in convolutions if (first := _channels_first(shape)) is not None}
    if len(found) > 1:
        raise CheckpointError(
            f"{where} mixes two layouts: convolutions are {list(found[True])} as Hugging Face writes them and "
            f"{list(found[False])} as MLX does. Files of two checkpoints lie in one folder: keep those of one"
        )
    return next((HF if first else MLX for first in found), None)


def _agreed(marked: str | None, named: str | None, packed: bool, names: list[str], where: str) -> str:
    """How values are written where no convolution says it."""
    if marked and named and marked != named:
        raise CheckpointError(
            f"{where}: the files' metadata says format {'mlx' if marked == MLX else 'pt'!r}, but {names[0]} is "
            f"{'an MLX' if named == MLX else 'a Hugging Face'} name, so it is unclear whether the norms are shifted. "
            "Convert the original checkpoint again"
        )
    found = marked or named or (MLX if packed else None)
    if found is None:
        # Plain model.* names without a marker: HF's, if the loader can check it by the convolution's strict shape.
        if not any(name.endswith("conv1d.weight") for name in names):
            raise CheckpointError(
                f"{where}: neither metadata nor names say whether this is a Hugging Face or an MLX checkpoint. "
                'Write the files again with the metadata {"format": "pt"} or {"format": "mlx"}'
            )
        return HF
    return found


def _named(text: str, vision: str | None, names: list[str]) -> str | None:
    """Whose names these are; None where both have them."""
    if text != "model.":
        return MLX if text == "language_model.model." else HF
    if vision:
        return MLX if vision == "vision_tower." else HF
    found = {MLX if match[2] == "switch_mlp" else HF for name in names if (match := _MAIN_EXPERT.fullmatch(name))}
    return found.pop() if len(found) == 1 else None


def _is_packed(names: list[str]) -> bool:
    """Whether MLX quantized something: .scales are GPTQ's too, but that has no .weight beside them."""
    weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    return any(name.endswith(".scales") and name.removesuffix(".scales") in weights for name in names)


def _one_of(prefixes: tuple[str, ...], names: list[str], what: str, where: str) -> str | None:
    """The one of the prefixes under which anything lies; None where nothing does."""
    found: dict[str, str] = {}
    for name in (name for name in names if name.startswith(prefixes)):
        found.setdefault(next(p for p in prefixes if name.startswith(p)), name)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise CheckpointError(
            f"{where} has its {what} twice, or mixes two ways of naming: {first} and {second}. "
            "Files of two checkpoints lie in one folder: keep those of one"
        )
    return next(iter(found), None)


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


def _text_prefix(names: list[str], where: str) -> str:
    found: dict[str, str] = {}
    others = (*TOWERS, *_HEADS, *MTP_PREFIXES)
    for name in (name for name in names if name.startswith(_TEXT_PREFIXES) and not name.startswith(others)):
        found.setdefault(next(p for p in _TEXT_PREFIXES if name.startswith(p)), name)
    hf, mlx = (found.get(prefix) for prefix in _TEXT_PREFIXES[:2])
    if hf and mlx:
        raise CheckpointError(
            f"{where} mixes two layouts: {hf} is a Hugging Face name, {mlx} an MLX one. "
            "Files of two checkpoints lie in one folder: keep those of one"
        )
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise CheckpointError(
            f"{where} mixes two ways of naming: {first} and {second}. "
            "Files of two checkpoints lie in one folder: keep those of one"
        )
    if not found:
        raise CheckpointError(
            f"{where} holds no tensor of a text model ({', '.join(p + '*' for p in _TEXT_PREFIXES)}): "
            "is this the folder of a Qwen3.5, 3.6 or 3.8 checkpoint?"
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
