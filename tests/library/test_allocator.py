"""Memory that was freed stays with the process, on glibc."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from mlx_qwen35.machine.allocator import keep_freed_memory
library = ctypes.CDLL(None)
if not hasattr(library, "gnu_get_libc_version"):
    raise SystemExit(3)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [library.malloc(2**21) for _ in range(12)]
    for piece in pieces:
        ctypes.memset(piece, 1, 2**21)
    for piece in pieces:
        library.free(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(3)][-1])
keep_freed_memory()
print([faults() for _ in range(3)][-1])
"""


def test_memory_that_was_freed_need_not_be_had_from_the_system_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("no glibc")
    before, after = map(int, done.stdout.split())
    assert before > 100 > after, done.stderr
