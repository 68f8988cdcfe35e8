"""MODELLED, not measured: how fast a decode step could be on each Mac, from the counts of launches.py.

    python benchmarks/roofline.py [--size 35B-A3B ...] [--context 4096] [--out FILE]

    bound     tokens a second if memory gave its stated bandwidth and nothing else took time: bytes bound / bandwidth
    modelled  bytes moved / bandwidth + launches x gap, for the two gaps below

Bandwidths are the ones Apple states for the chip (technical specifications of the Macs that have it). No machine
reaches them quite. Chips whose largest memory does not hold the model are left out. The gap is the time that passes on
a GPU between two operations of which one needs the other's result. No Mac was here to measure it; mlx-lm was reported
at 74 to 133 tokens a second for the 35B at 4 bits on chips of 307 and 400 GB/s, which with its count leaves 1 to 5
microseconds an operation, and these are the two gaps. Small operations overlap with nothing in this model, and large
ones are taken to run at full bandwidth: it says what fewer launches can bring, not what a Mac will do.

Knows chips and the counts. Knows no model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import geometry  # noqa: E402
from benchmarks.launches import COUNTED, SIDES, Count, PretendedMetal, count  # noqa: E402
from benchmarks.measuring import circumstances, write  # noqa: E402

# GB/s, and the most memory that comes with it in GiB, as Apple states them
CHIPS = {
    "M1": (68, 16), "M1 Pro": (200, 32), "M1 Max": (400, 64), "M1 Ultra": (800, 128), "M2": (100, 24),
    "M2 Pro": (200, 32), "M2 Max": (400, 96), "M2 Ultra": (800, 192), "M3": (100, 24), "M3 Pro": (150, 36),
    "M3 Max": (400, 128), "M3 Ultra": (819, 512), "M4": (120, 32), "M4 Pro": (273, 64), "M4 Max": (546, 128),
    "M5": (153, 32), "M5 Pro": (307, 64), "M5 Max": (614, 128),
}  # fmt: skip
GAPS = (1e-6, 5e-6)  # seconds
USABLE = 0.75  # of the memory: about what macOS lets a GPU use


def bound(found: Count, bandwidth: float) -> float:
    """Tokens a second that the bytes alone allow; bandwidth: GB/s."""
    return bandwidth * 1e9 / found.bound


def modelled(found: Count, bandwidth: float, gap: float) -> float:
    """Tokens a second when every operation also waits `gap` seconds."""
    return 1 / (found.moved / (bandwidth * 1e9) + found.launches * gap)


def rows(counts: dict[str, Count]) -> list[dict[str, Any]]:
    """One a chip that can hold the weights: the bound, and of each side (slowest, fastest) modelled."""
    ours = next(iter(counts.values()))
    return [
        {"chip": chip, "bandwidth": bandwidth, "bound": round(bound(ours, bandwidth), 1)}
        | {side: [round(modelled(c, bandwidth, gap), 1) for gap in reversed(GAPS)] for side, c in counts.items()}
        for chip, (bandwidth, memory) in CHIPS.items()
        if ours.held <= USABLE * memory * 2**30
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="*", choices=geometry.SIZES, default=list(COUNTED))
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache (4096)")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args()
    records = []
    with PretendedMetal():
        for size in arguments.size:
            counts = {side: count(side, size, 2 * geometry.PERIOD, arguments.context) for side in SIDES}
            made = rows(counts)
            print(f"\n{size}, {arguments.context} tokens of context, 4 bits: tokens a second, MODELLED (see the file)")
            print(f"{'chip':10s}{'GB/s':>6s}{'bound':>9s}" + "".join(f"{side:>18s}" for side in counts))
            for row in made:
                cells = "".join(f"{'{} .. {}'.format(*row[side]):>18s}" for side in counts)
                print(f"{row['chip']:10s}{row['bandwidth']:6d}{row['bound']:9.1f}{cells}")
            records += [{"benchmark": "roofline", "how": "modelled", "size": size, "gaps": GAPS} | row for row in made]
    print()
    write(records, circumstances(), arguments.out)


if __name__ == "__main__":
    main()
