"""A table and plots of what the benchmarks printed. Knows their JSON lines and matplotlib; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import spread

Records = Sequence[dict[str, Any]]
_COMPARED = ("startup", "prefill", "decode", "memory", "kernels")
_CHIPS = ("M1", "M2 Max", "M3 Ultra", "M4 Pro", "M4 Max", "M5 Max")  # in the table; the plot has all


def markdown(records: Records) -> str:
    """bench.md: what was compared, what was counted, and what was modelled from it."""
    lines = ["# What `make bench` found", ""]
    lines += [f"**{r['benchmark']}**: {r['trouble']}\n" for r in records if "trouble" in r]
    records = [record for record in records if "trouble" not in record]
    lines += _compared([record for record in records if record["benchmark"] in _COMPARED])
    lines += _launches([record for record in records if record["benchmark"] == "launches"])
    lines += _roofline([record for record in records if record["benchmark"] == "roofline"])
    return "\n".join(lines).rstrip() + "\n"


def _made(records: Records) -> str:
    """The machines, versions and commits of some records, each once."""
    told = {
        f"{r['machine']}, MLX on the {r['device']}; Python {r['python']}, mlx {r['mlx']}, mlx-lm {r['mlx_lm']}, "
        f"mlx-vlm {r['mlx_vlm']}, "
        f"OpenBLAS {r['openblas'] or 'no'}; commit {r['commit']}, {r['date']}"
        for r in records
    }
    return "; ".join(sorted(told))


def _loads(records: Records) -> str:
    loads = sorted(record["load_before"] for record in records)
    return f"{loads[0]:.1f} to {loads[-1]:.1f}"


def _digits(value: float) -> str:
    return ".0f" if value >= 100 else ".1f" if value >= 10 else ".3f" if value >= 0.1 else ".5f"


def _compared(records: Records) -> list[str]:
    if not records:
        return []
    lines = [
        "## Measured, in turns on one machine",
        "",
        f"{_made(records)}; load before each, from other work: {_loads(records)}. "
        "Median [least .. most] of the rounds; the ratio, theirs / ours, is formed round by round.",
        "",
        "| | model | beside | rounds | ours | theirs | theirs / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        model = r.get("case", "")
        model += f" ({r['cut']})" if r.get("cut") else ""
        form = _digits(r["ours"]["median"])
        cells = [f"{spread(r[side], form)} {r['unit']}" for side in ("ours", "theirs")]
        lines.append(
            f"| {r['quantity']} | {model} | {r.get('peer', 'mlx-lm')} | {r['rounds']} | {cells[0]} | {cells[1]} | "
            f"{spread(r['ratio'], '.2f')} |"
        )
    return [*lines, ""]


def _launches(records: Records) -> list[str]:
    if not records:
        return []
    lines = [
        "## Counted in the traced graph: a decode step at 4 bits",
        "",
        f"Nothing was run. {_made(records)}; {records[0]['context']} tokens in the cache. The rule stands in "
        "benchmarks/graph.py.",
        "",
        "| | launches: ours | mlx-lm | ours / mlx-lm | GB moved: ours | mlx-lm | bound | ours over the bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in dict.fromkeys(record["size"] for record in records):
        by_side = {record["side"]: record for record in records if record["size"] == size}
        if len(by_side) < 2:
            continue
        ours, theirs = by_side["ours"], by_side["mlx-lm"]
        moved = [f"{r['bytes'] / 1e9:.3f}" for r in (ours, theirs)]
        launches = [f"{r['launches']:,}" for r in (ours, theirs)] + [f"{ours['launches'] / theirs['launches']:.2f}"]
        least = [f"{ours['bytes_bound'] / 1e9:.3f}", f"{ours['bytes'] / ours['bytes_bound'] - 1:.1%}"]
        lines.append(f"| {size} | {' | '.join([*launches, *moved, *least])} |")
    return [*lines, ""]


def _roofline(records: Records) -> list[str]:
    if not records:
        return []
    slow, fast = (f"{gap * 1e6:g}" for gap in sorted(records[0]["gaps"], reverse=True))
    lines = [
        "## Modelled: tokens a second on Macs, from these counts",
        "",
        f"No Mac was measured. Bytes at Apple's stated bandwidth, and {slow} .. {fast} microseconds an operation "
        "(assumptions: benchmarks/roofline.py).",
        "",
        "| | chip | GB/s | bound by bytes | ours | mlx-lm |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        if r["chip"] in _CHIPS:
            sides = ["{:.0f} .. {:.0f}".format(*r[side]) for side in ("ours", "mlx-lm")]
            cells = [r["size"], r["chip"], str(r["bandwidth"]), f"{r['bound']:.0f}", *sides]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw(records: Records, folder: Path) -> bool:
    """Write bench-*.png. False without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    kept = [record for record in records if "trouble" not in record]
    plots = {"compared": _plot_compared, "launches": _plot_launches, "roofline": _plot_roofline}
    for name, plot in plots.items():
        mine = [r for r in kept if r["benchmark"] in (_COMPARED if name == "compared" else (name,))]
        if mine:
            figure = plot(pyplot, mine)
            figure.tight_layout()
            figure.savefig(folder / f"bench-{name}.png", dpi=100)
            pyplot.close(figure)
    return True


def _plot_compared(pyplot: Any, records: Records) -> Any:
    figure, place = pyplot.subplots(figsize=(8, 1 + 0.32 * len(records)))
    names = [f"{r['quantity']} {r.get('case', '')} / {r.get('peer', 'mlx-lm')}" for r in records]
    middle = [r["ratio"]["median"] for r in records]
    sides = [[m - r["ratio"]["min"] for m, r in zip(middle, records, strict=True)],
             [r["ratio"]["max"] - m for m, r in zip(middle, records, strict=True)]]  # fmt: skip
    place.barh(names, middle, xerr=sides, color="C0", ecolor="0.3", capsize=2)
    place.axvline(1, color="0.3", linewidth=1)
    place.set_xscale("log")
    place.invert_yaxis()
    place.set_xlabel("theirs / ours, median and range; right of 1: ours needs less")
    place.set_title(f"{records[0]['machine']}, MLX on the {records[0]['device']}", fontsize=9)
    return figure


def _plot_launches(pyplot: Any, records: Records) -> Any:
    figure, place = pyplot.subplots(figsize=(7, 3.5))
    sizes = list(dict.fromkeys(record["size"] for record in records))
    for number, side in enumerate(("ours", "mlx-lm")):
        found = {r["size"]: r["launches"] for r in records if r["side"] == side}
        bars = place.bar([n + 0.4 * number for n in range(len(sizes))], [found[s] for s in sizes], 0.38, label=side)
        place.bar_label(bars, fontsize=8)
    place.set_xticks([n + 0.2 for n in range(len(sizes))], sizes)
    place.set_ylabel("launches a token")
    place.set_title("Counted in the traced graph, not run", fontsize=9)
    place.legend()
    return figure


def _plot_roofline(pyplot: Any, records: Records) -> Any:
    sizes = list(dict.fromkeys(record["size"] for record in records))
    figure, places = pyplot.subplots(1, len(sizes), figsize=(4 * len(sizes), 3.6), squeeze=False)
    for place, size in zip(places[0], sizes, strict=True):
        found = sorted((r for r in records if r["size"] == size), key=lambda r: r["bandwidth"])
        x = [r["bandwidth"] for r in found]
        place.plot(x, [r["bound"] for r in found], "k--", label="bound by bytes")
        for color, side in enumerate(("ours", "mlx-lm")):
            low, high = ([r[side][end] for r in found] for end in (0, 1))
            place.fill_between(x, low, high, alpha=0.35, color=f"C{color}", label=side)
        place.set(xlabel="GB/s", ylabel="tokens a second", title=f"{size}, modelled", ylim=(0, None))
        place.grid(alpha=0.3)
    places[0][0].legend(fontsize=8)
    return figure
