"""Door: `python -m mlx_qwen35` is `mlx-qwen35`."""

import sys

from mlx_qwen35.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
