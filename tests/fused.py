"""MLX fuses operations on a CPU by a program each, which g++ compiles, and most of that time is one header of MLX's.

Parses it once for all of them. Knows how MLX calls g++, and where it keeps what was made. Knows no operation.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

HEADER = "mlx/backend/cpu/compiled_preamble.h"
SCRIPT = """#!/bin/sh
# g++, with what MLX's programs begin with parsed beforehand; where that suits no more, g++ reads the header itself.
if [ "$1" != --version ] && [ ! -e "{parsed}.gch" ]; then
    "{compiler}" -std=c++17 -O3 -Wall -fPIC -x c++-header "-I{include}" "{include}/{header}" -o "{parsed}.$$" \\
        2>/dev/null && mv "{parsed}.$$" "{parsed}.gch"
fi
exec "{compiler}" "-I{folder}" "$@"
"""


def parsed_once() -> None:
    """From now on this process and its children call g++ by a script that does so, where MLX calls it at all."""
    compiler, package = shutil.which("g++"), importlib.util.find_spec("mlx")
    if sys.platform != "linux" or compiler is None or package is None or compiler.endswith("/mlx_fused/g++"):
        return
    include = next((Path(at) / "include" for at in package.submodule_search_locations or ()), None)
    if include is None or not (include / HEADER).is_file():
        return
    folder = Path(tempfile.gettempdir()) / "mlx" / importlib.metadata.version("mlx") / "parsed"
    script, parsed = folder / "mlx_fused" / "g++", folder / HEADER
    text = SCRIPT.format(compiler=compiler, include=include, header=HEADER, parsed=parsed, folder=folder)
    for each in (script, parsed):
        each.parent.mkdir(parents=True, exist_ok=True)
    if not script.exists() or script.read_text() != text:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "g++"
            made.write_text(text)
            made.chmod(0o755)
            made.replace(script)
    os.environ["PATH"] = os.pathsep.join([str(script.parent), os.environ.get("PATH", "")])
