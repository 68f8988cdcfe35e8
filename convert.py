"""Door: `python convert.py SOURCE TARGET` is `mlx-qwen35 convert SOURCE TARGET`."""

import sys

try:
    from mlx_qwen35.cli.main import main
except ImportError as error:  # of a Python that is too old
    sys.exit("error: %s" % error)  # noqa: UP031  - which knows no other way

if __name__ == "__main__":
    sys.exit(main(["convert"] + sys.argv[1:]))
