"""Read by every Python that starts with this folder in PYTHONPATH: it pretends to be on a Mac (pretended.py).

Knows the way to that file and nothing else.
"""

import importlib.util
import os
import sys
from pathlib import Path

if os.environ.get("MLX_QWEN35_TESTS_AS_MAC") and sys.platform != "darwin":
    _spec = importlib.util.spec_from_file_location("pretended_mac", Path(__file__).parents[1] / "pretended.py")
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    _module.pretend()
