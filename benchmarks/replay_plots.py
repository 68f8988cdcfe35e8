"""The plots of benchmarks/replay.py. Knows its results and matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LINES = {"LRU": "C0o-", "SLRU": "C1s-", "LFU": "C2^-", "Belady": "C7--"}


def draw(known: dict[str, Any], folder: Path) -> bool:
    """Draw what is known. False without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    folder.mkdir(exist_ok=True)
    for name, plot in {"policies": _policies, "recall": _recall, "prefetch": _prefetch}.items():
        if name in known:
            figure = plot(pyplot, known[name]["found"])
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=90)
            pyplot.close(figure)
    return True


def _hit_rates(place: Any, found: dict[str, dict[str, float]], title: str) -> None:
    shares = [float(share) for share in found]
    for name, line in LINES.items():
        place.plot(shares, [found[share][name] for share in found], line, label=name, markersize=4)
    place.plot([0, 1], [0, 1], color="0.85", linewidth=1, zorder=0)
    place.set(xlim=(0, 1), ylim=(0, 1))
    place.set_title(title, fontsize=9)
    place.grid(alpha=0.3)


def _policies(pyplot: Any, found: dict[str, Any]) -> Any:
    titled = [("demo, replies", found["demo"]["hit_rate"])]
    for row in found["drawn"]:
        topic = f", topic {row['topic']}" if row["topic"] else ""
        titled.append((f"skew {row['skew']}, stay {row['stay']}{topic}", row["hit_rate"]))
    columns = 4
    rows = -(-len(titled) // columns)
    figure, places = pyplot.subplots(rows, columns, figsize=(12, 3 * rows), sharex=True, sharey=True)
    for place in places.flat[len(titled) :]:
        place.axis("off")
    for place, (title, rates) in zip(places.flat, titled, strict=False):
        _hit_rates(place, rates, title)
    for place in places[-1]:
        place.set_xlabel("share of experts in memory")
    for place in places[:, 0]:
        place.set_ylabel("hit rate")
    places[0, 0].legend(fontsize=8)
    return figure


def _recall(pyplot: Any, found: dict[str, Any]) -> Any:
    figure, (by_named, by_layer) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, values in found.items():
        named = range(1, len(values["by_named"]) + 1)
        by_named.plot(named, values["by_named"], "o-", markersize=4, label=name)
        by_layer.plot([int(x) for x in values["by_layer"]], values["by_layer"].values(), "o-", markersize=4)
    by_named.set(xlabel="experts named, of 16 (4 are asked for)", ylabel="recall", ylim=(0, 1.02))
    by_layer.set(xlabel="layer whose 4 experts are named", ylabel="recall of the first 4", ylim=(0.6, 1))
    by_named.legend(fontsize=8)
    for place in (by_named, by_layer):
        place.grid(alpha=0.3)
    return figure


def _prefetch(pyplot: Any, found: list[dict[str, Any]]) -> Any:
    figure, (read, time) = pyplot.subplots(1, 2, figsize=(10, 4))
    rows = [row for row in found if row["trace"] == "drawn"]
    for color, share in enumerate(sorted({row["share"] for row in rows})):
        for rule, line in (("as built", "o-"), ("spares the last token's", "x:"), ("wrong ones stay", "+:")):
            chosen = [row for row in rows if row["share"] == share and row["rule"] == rule]
            label = f"{share:.1%} in memory" if rule == "as built" else None
            style = {"color": f"C{color}", "markersize": 5, "label": label}
            read.plot([row["read"] for row in chosen], [row["waited"] for row in chosen], line, **style)
            if rule == "as built":
                most = [row["most"] for row in chosen]
                time.plot(most, [_relative_time(row, chosen[0]) for row in chosen], line, **style)
    read.set(xlabel="read, per expert asked for", ylabel="waited for, per expert asked for")
    time.set(xlabel="records that the disk reads while a layer computes", ylabel="time a token, without prefetching 1")
    time.set(ylim=(0.4, 1.02))
    read.legend(fontsize=8, title="o as built, x spares the last token's, + wrong ones stay", title_fontsize=7)
    for place in (read, time):
        place.grid(alpha=0.3)
    return figure


def _relative_time(row: dict[str, Any], without: dict[str, Any], top_k: int = 10) -> float:
    """A model: computing a layer takes as long as reading `most` records, and what is waited for comes on top."""
    return (row["most"] + row["waited"] * top_k) / (row["most"] + without["waited"] * top_k)
