"""What a model would take of several Macs, and how fast it may be there: nothing is loaded, and no other machine asked.

Knows names of models, sizes of Macs and links. The plan is parallel/plan.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.checkpoint.inventory import text_tensors
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.quantize import default_spec
from mlx_qwen35.conversion.recipes import assign
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.library.estimating import described
from mlx_qwen35.library.holding import process_bytes
from mlx_qwen35.library.macs import mac_memory
from mlx_qwen35.library.plan import shown_size
from mlx_qwen35.library.portions import options_of, sizes_of
from mlx_qwen35.library.told import told_specs
from mlx_qwen35.parallel.plan import KINDS, LINKS, Host, Plan, choose, plans

if TYPE_CHECKING:
    from mlx_qwen35.parallel.plan import Sizes

_WORKING = 2 << 30  # bytes that a prompt takes while it is read, roughly


@dataclass(frozen=True)
class OnHosts:
    """A plan for some Macs, and the others that there are. macs: their memory in words; link: one of LINKS."""

    name: str
    macs: tuple[str, ...]
    link: str
    plan: Plan
    others: dict[str, Plan]
    experts: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "hosts": list(self.macs), "link": self.link, "plan": asdict(self.plan),
            "tokens_per_second": 1 / self.plan.seconds, "modelled": True,
            "others": {kind: asdict(plan) for kind, plan in self.others.items()},
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.name} on {len(self.macs)} Macs over {LINKS[self.link].name}: {self.plan.kind}"]
        each = zip(self.macs, self.plan.shares, self.plan.nbytes, self.plan.held, strict=True)
        what = "layers" if self.plan.kind == "pipeline" else "experts" if self.experts else "part"
        for rank, (mac, (first, stop), size, held) in enumerate(each):
            some = "" if held >= 1 else f", {held:.0%} of its experts in memory, the others read from its disk"
            lines.append(f"  rank {rank}, {mac}: {what} {first} to {stop - 1}, {shown_size(size)}{some}")
        lines.append("  Modelled, not measured, from published figures for links and Macs:")
        for kind in KINDS:
            made = self.others.get(kind)
            if made is not None:
                fits = "" if made.fits else ", not all in memory"
                lines.append(f"    {kind}: {1e3 * made.seconds:.1f} ms a token, {1 / made.seconds:.1f} a second{fits}")
        lines.append(f"  {self.plan.why}")
        return "\n".join(lines)


def estimate_hosts(
    ref: str | Path | None,
    hosts: Sequence[str] | str,
    link: str = "tb5",
    *,
    plan: str | None = None,
    bits: int | None = None,
    context_length: int | None = None,
    dtype: mx.Dtype | str | None = None,
    kv_form: KVFormat | None = None,
) -> OnHosts:
    """hosts: the memory of each Mac, as "64GB,128GB" or a list; link: one of LINKS. bits: as a conversion to so many
    bits has it. The others as in `load`. Raises ArgumentError where nothing fits, with figures, and as `estimate`."""
    macs = tuple(mac.strip() for mac in (hosts.split(",") if isinstance(hosts, str) else hosts))
    if len(macs) < 2:
        raise ArgumentError(f"hosts is {hosts!r}; give the memory of two Macs or more, such as 64GB,128GB")
    if link not in LINKS:
        raise ArgumentError(f"link is {link!r}; there are {', '.join(LINKS)}")
    name, config, found, _ = described(ref)
    if bits is not None:
        specs = assign(None, text_tensors(config), default_spec(bits, 64, "affine"), config)
    elif found is not None and found.source is not None:
        specs = found.source.specs
    else:
        specs = told_specs(config)
    options = options_of(
        dtype=dtype or mx.bfloat16, context_length=context_length, yarn=False, kv_form=kv_form, exact=False,
        kernels=True, plan=plan,
    )  # fmt: skip
    sizes: Sizes = sizes_of(config, specs, compute_dtype(options.dtype).size, options, len(macs))
    beside = process_bytes(found.folder if found else None) + _WORKING
    machines = [Host(max(mac_memory(mac)[0] - beside, 0)) for mac in macs]
    chosen = choose(sizes, machines, LINKS[link], plan)
    return OnHosts(name, macs, link, chosen, plans(sizes, machines, LINKS[link]), sizes.num_experts)
