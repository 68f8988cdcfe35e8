"""Builds llama.cpp from the source in llama-cpp-python's package, and the program that asks it.

    python tests/peers/llama_cpp/build.py FOLDER

Needs pip with a package index, cmake, ninja and a C++ compiler; takes a quarter of an hour of one core. FOLDER keeps
what was built: a second call returns at once. For the CPU, one compiler at a time, no OpenMP.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"  # has llama.cpp 0c1e57098
_HERE = Path(__file__).parent
_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_OPENMP=OFF", "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip


def built(folder: Path, seconds: float = 3600) -> Path:
    """The program `probe` in a folder, built if it is not there. Raises subprocess.SubprocessError."""
    program = folder / "probe"
    if program.exists() and program.stat().st_mtime > (_HERE / "probe.cpp").stat().st_mtime:
        return program
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "build" / "bin"
    if not list(library.glob("libllama.*")):
        source = _source(folder)
        _run("cmake", "-S", source, "-B", folder / "build", "-G", "Ninja", *_FLAGS, seconds=seconds)
        _run("ninja", "-C", folder / "build", "-j", "1", "llama", seconds=seconds)
    source = _source(folder)
    _run(
        "c++", "-std=c++17", "-O1", _HERE / "probe.cpp", "-o", program, f"-I{source}/include",
        f"-I{source}/ggml/include", f"-L{library}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{library}",
        seconds=seconds,
    )  # fmt: skip
    return program


def _source(folder: Path) -> Path:
    """The source of llama.cpp, fetched and unpacked once."""
    name = PACKAGE.replace("-", "_").replace("==", "-")
    found = folder / name / "vendor" / "llama.cpp"
    if not found.is_dir():
        package = folder / f"{name}.tar.gz"
        if not package.exists():
            pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=llama-cpp-python")
            _run(*pip, "--dest", folder, PACKAGE, seconds=900)
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
    return found


def _run(*command: object, seconds: float) -> None:
    subprocess.run(["nice", "-n", "19", *map(str, command)], check=True, timeout=seconds)


if __name__ == "__main__":
    print(built(Path(sys.argv[1]).absolute()))
