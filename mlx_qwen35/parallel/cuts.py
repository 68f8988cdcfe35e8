"""Which rows and columns of which tensor a rank holds.

Knows our names of tensors, geometry and plans. Knows no files and no arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_qwen35.config import ModelConfig, QuantSpec, TextConfig
from mlx_qwen35.parallel.plan import Plan, undividable

Span = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """rows: of axis 0, one after the other; None: all. columns: (first, stop, of how many) of the last axis as the
    unquantized tensor has it; None: all."""

    rows: tuple[Span, ...] | None = None
    columns: tuple[int, int, int] | None = None


WHOLE = Cut()
_BLOCK = 32  # rows


def cut_of(name: str, config: ModelConfig, plan: Plan, rank: int) -> Cut | None:
    """What of one of our tensors a rank holds; None: nothing."""
    if name.startswith("lm_head.") and rank and plan.kind == "tensor":
        return Cut(rows=(vocabulary_span(config.text.vocab_size, plan.ranks, rank),))
    if name.startswith(("vision.", "lm_head.")):
        return WHOLE if rank == 0 else None
    if name.startswith("embed_tokens."):
        return WHOLE if rank == 0 or plan.kind != "pipeline" else None
    if not name.startswith("layers."):
        return WHOLE
    _, number, rest = name.split(".", 2)
    if plan.kind == "pipeline":
        first, stop = plan.shares[rank]
        return WHOLE if first <= int(number) < stop else None
    if rest.startswith("mlp.experts."):
        return Cut(rows=(plan.shares[rank],))
    if rest.startswith("mlp.shared_expert"):  # with its gate
        return WHOLE if rank == plan.ranks - 1 else None
    if plan.kind != "tensor":
        return WHOLE
    module = rest if rest.endswith(("A_log", "dt_bias")) else rest.rpartition(".")[0]
    return _of_tensor(module, config.text, plan.ranks, rank)


def _of_tensor(module: str, text: TextConfig, ranks: int, rank: int) -> Cut:
    key, value = text.linear_key_head_dim, text.linear_value_head_dim
    keys, values = text.linear_num_key_heads * key, text.linear_num_value_heads * value
    queries, heads = text.num_attention_heads * text.head_dim, text.linear_num_value_heads

    def part(size: int, start: int = 0) -> Span:
        return start + size * rank // ranks, start + size * (rank + 1) // ranks

    def rows(*spans: Span) -> Cut:
        return Cut(rows=spans)

    def columns(size: int) -> Cut:
        return Cut(columns=(*part(size), size))

    name = module.rpartition(".")[2]
    if name in ("k_proj", "v_proj"):
        first, stop = kv_heads(text.num_key_value_heads, ranks, rank)
        return rows((first * text.head_dim, stop * text.head_dim))
    if name in ("in_proj_qkv", "conv1d"):
        return rows(part(keys), part(keys, keys), part(values, 2 * keys))
    if module.startswith("mlp.") and text.intermediate_size:
        size = text.intermediate_size
        return columns(size) if name == "down_proj" else rows(part(size))
    found = {
        "q_proj": lambda: rows(part(2 * queries)), "o_proj": lambda: columns(queries),
        "in_proj_z": lambda: rows(part(values)), "out_proj": lambda: columns(values),
        "in_proj_a": lambda: rows(part(heads)), "in_proj_b": lambda: rows(part(heads)),
        "A_log": lambda: rows(part(heads)), "dt_bias": lambda: rows(part(heads)),
    }.get(name)  # fmt: skip
    return found() if found else WHOLE


def vocabulary_span(count: int, ranks: int, rank: int) -> Span:
    """Which rows of the head a rank computes; on whole blocks of a matrix where there are many."""
    block = _BLOCK if count >= 2 * _BLOCK * ranks else 1

    def edge(number: int) -> int:
        return count if number == ranks else count * number // ranks // block * block

    return edge(rank), edge(rank + 1)


def kv_heads(count: int, ranks: int, rank: int) -> Span:
    """Which key and value heads a rank's query heads read: a part of them, or one that several ranks have."""
    if count >= ranks:
        return count * rank // ranks, count * (rank + 1) // ranks
    return count * rank // ranks, count * rank // ranks + 1


def text_of(text: TextConfig, ranks: int) -> TextConfig:
    """The geometry of one rank's part of the layers, by tensor."""
    return replace(
        text,
        num_attention_heads=text.num_attention_heads // ranks,
        num_key_value_heads=max(1, text.num_key_value_heads // ranks),
        linear_num_key_heads=text.linear_num_key_heads // ranks,
        linear_num_value_heads=text.linear_num_value_heads // ranks,
        intermediate_size=text.intermediate_size and text.intermediate_size // ranks,
    )


def indivisible(config: ModelConfig, specs: dict[str, QuantSpec], ranks: int, turned: bool = False) -> str | None:
    """Why layers cannot be cut by tensor over so many ranks, with names and numbers; None: they can.

    specs: of quantized modules, whose columns are cut between groups only. turned: inputs are rotated as a whole.
    """
    text, counts = config.text, []
    if "full_attention" in text.layer_types:
        counts.append(("num_attention_heads", text.num_attention_heads))
    if "linear_attention" in text.layer_types:
        counts.append(("linear_num_key_heads", text.linear_num_key_heads))
        counts.append(("linear_num_value_heads", text.linear_num_value_heads))
    if text.intermediate_size:
        counts.append(("intermediate_size", text.intermediate_size))
    kv = text.num_key_value_heads if "full_attention" in text.layer_types else ranks
    problem = undividable(ranks, counts, kv)
    if problem or turned:
        return problem or "its weights are behind a rotation of whole inputs"
    widths = {"o_proj": text.num_attention_heads * text.head_dim, "down_proj": text.intermediate_size or 0,
              "out_proj": text.linear_num_value_heads * text.linear_value_head_dim}  # fmt: skip
    for module, spec in specs.items():
        width = widths.get(module.rpartition(".")[2], 0)
        if module.startswith("layers.") and ".mlp.experts." not in module and ".shared_expert" not in module:
            if width % (ranks * spec.group_size):
                return f"{ranks} ranks do not divide the {width // spec.group_size} groups of {module}"
    return None
