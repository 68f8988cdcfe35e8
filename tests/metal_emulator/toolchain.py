"""What compiles kernels here: clang, the Metal headers of this version of MLX, nvcc.

Knows where they are found, fetches the headers once, and says what is missing. Knows nothing of kernels.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".metal_emulator"  # `make clean` removes it
LEAST_CLANG = 19  # the first with arithmetic on __bf16 as a Mac has it

LINK = ["--rtlib=compiler-rt", "--unwindlib=libgcc"]  # GCC 12's runtime does not know bfloat

# Headers of the Mac's compiler that MLX's own ask for: their names are in msl.h. And of MLX's own, those that need more
# of Metal than kernels here do.
_OF_METAL = ("stdlib", "math", "common", "limits", "type_traits", "logging", "compute", "simdgroup")
_INSTEAD = {
    "bf16_math.h": "",
    "logging.h": "namespace mlx { struct os_log {}; }\n",
    "complex.h": "template <class T> struct complex_t {\n"
    "  T real, imag;\n"
    "  constexpr complex_t(T a, T b) : real(a), imag(b) {}\n"
    "};\n"
    "typedef complex_t<float> complex64_t;\n",
}


class Missing(Exception):
    """The emulator cannot run here; the text says what it takes."""


class CompileError(Exception):
    """A kernel does not compile."""


@functools.cache
def clang() -> str:
    """The path of clang++; raises Missing."""
    for name in ("clang++", *(f"clang++-{number}" for number in range(30, LEAST_CLANG - 1, -1))):
        path = shutil.which(name)
        if path is None:
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"clang version (\d+)", said)
        if version and "Apple" not in said and int(version[1]) >= LEAST_CLANG:
            _check_runtime(path, int(version[1]))
            return path
    raise Missing(f"no clang++ {LEAST_CLANG} or newer (Debian: apt-get install clang-{LEAST_CLANG})")


def _check_runtime(path: str, version: int) -> None:
    command = [path, *LINK, "-fsanitize=address", "-x", "c++", "-", "-o", "/dev/null"]
    if subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode:
        raise Missing(f"clang++ has no runtime (Debian: apt-get install libclang-rt-{version}-dev)")


@functools.cache
def metal_headers() -> list[str]:
    """-I options for MLX's Metal headers, fetched once into CACHE; raises Missing."""
    version = importlib.metadata.version("mlx")
    folder = CACHE / f"mlx-metal-{version}"
    if not folder.is_dir():
        _fetch(version, folder)
    stand_ins = CACHE / "stand_ins"
    kernels = stand_ins / "mlx" / "backend" / "metal" / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    for name in _OF_METAL:
        (stand_ins / f"metal_{name}").touch()
    for name, text in _INSTEAD.items():
        write(kernels / name, f"#pragma once\n{text}")
    return [f"-I{stand_ins}", f"-I{folder / 'mlx' / 'include'}"]


def _fetch(version: str, folder: Path) -> None:
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [
            "--only-binary=:all:",
            "--platform",
            "macosx_14_0_arm64",
            "--dest",
            scratch,
            f"mlx-metal=={version}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise Missing(f"the Metal headers of MLX {version} cannot be fetched: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("mlx/include/mlx/")]
            wheel.extractall(Path(scratch) / "unpacked", names)
        try:
            (Path(scratch) / "unpacked").replace(folder)
        except OSError:
            if not folder.is_dir():  # another process was quicker
                raise


@functools.cache
def nvcc() -> str:
    """The path of nvcc; raises Missing."""
    path = shutil.which("nvcc")
    if path is None:
        raise Missing("no nvcc")
    return path


def compiled(command: list[str], source: str | None = None) -> str:
    """What a compiler prints to stdout; raises CompileError with what it objects to."""
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr[:6000])
    return done.stdout


def write(path: Path, text: str) -> Path:
    """A file with this text, unless it is there: never half a one, since another process may read or write the same."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            (Path(scratch) / path.name).write_text(text)
            (Path(scratch) / path.name).replace(path)
    return path


def once(target: Path, command: list[str]) -> Path:
    """Make `target` with a command that ends in `-o TARGET`, unless it is there; another process may do the same."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            compiled([*command, "-o", str(made)])
            made.replace(target)
    return target
