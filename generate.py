"""Door: `python generate.py -p "..."` is `mlx-qwen35 generate -p "..."`."""

import sys

from mlx_qwen35.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
