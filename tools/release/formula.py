"""Prints the Homebrew formula of a release: `python tools/release/formula.py dist/mlx_qwen35-0.1.0.tar.gz --url URL`.

Knows the template beside it. `--url` is where the source distribution can be had, `--homepage` where the project is.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

TEMPLATE = Path(__file__).with_name("mlx-qwen35.rb.in")


def formula(source: Path, url: str, homepage: str) -> str:
    """The template filled in for one source distribution."""
    text = TEMPLATE.read_text(encoding="utf-8")
    values = {"URL": url, "HOMEPAGE": homepage, "SHA256": hashlib.sha256(source.read_bytes()).hexdigest()}
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the Homebrew formula of a release.")
    parser.add_argument("source", type=Path, help="the source distribution, a .tar.gz")
    parser.add_argument("--url", required=True, help="where it can be had")
    parser.add_argument("--homepage", required=True, help="where the project is")
    args = parser.parse_args()
    print(formula(args.source, args.url, args.homepage), end="")


if __name__ == "__main__":
    main()
