"""Door: `python convert.py SOURCE TARGET` is `mlx-qwen35 convert SOURCE TARGET`."""

import sys

from mlx_qwen35.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
