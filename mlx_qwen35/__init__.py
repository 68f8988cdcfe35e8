"""The public face of the package: its names, each imported from its module when it is first asked for (PEP 562).

So `import mlx_qwen35` costs next to nothing, and a user of the tokenizer alone never waits for the model. Which name
lives in which module is said in __init__.pyi, once: type checkers read it, and so does this.
"""

import os
import sys
from importlib import import_module
from typing import Any

if sys.version_info < (3, 10):  # noqa: UP036  - a clone is imported by whatever Python there is
    _told = "mlx-qwen35 needs Python 3.10 or newer, and this is %d.%d (%s): in its clone `make demo` looks for one"
    _told %= (sys.version_info[0], sys.version_info[1], sys.executable)
    if sys.argv[:1] == ["-m"]:  # which would print where it was raised
        sys.exit("error: " + _told)
    raise ImportError(_told)

__version__ = "0.1.0"

_home: dict[str, str] = {}  # of each name its module, once one was asked for


def _modules() -> dict[str, str]:
    """Of each public name its module, by lines `from MODULE import NAME as NAME`."""
    if not _home:
        with open(os.path.splitext(__file__)[0] + ".pyi", encoding="utf-8") as stub:
            said = [line.split() for line in stub if line.startswith("from ")]
        _home.update({name: module for _, module, _, name, *_ in said})
    return _home


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_modules())
    if name.startswith("__") or name not in _modules():
        raise AttributeError(f"module 'mlx_qwen35' has no attribute {name!r}")
    value = getattr(import_module(_modules()[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})
