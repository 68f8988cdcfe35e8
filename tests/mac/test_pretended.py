"""The pretended Mac itself, and a part of the suite on it; `make test ARGS=--as-mac` runs all of it."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import AS_MAC, CHECKOUT
from tests.mac.pretended import CANNOT, GPU, environment

pytestmark = pytest.mark.skipif(AS_MAC or sys.platform == "darwin", reason="this is a Mac, or pretends to be one")

# What asks the system most, and what asks much of it through others; a minute of a slow machine.
PART = ("tests/mac", "tests/conversion/test_disk.py", "tests/experts/test_handles.py")
MORE = (
    "tests/library/test_holding.py", "tests/library/test_hub.py", "tests/checkpoint/test_files.py",
    "tests/cli/test_experts.py", "tests/benchmarks/test_mac.py",
)  # fmt: skip

ASKED = """
import json, os, platform, subprocess, sys
from pathlib import Path
import numpy, mlx.core as mx
from mlx_qwen35.machine import files, gpu, system
child = subprocess.run([sys.executable, "-c", "import sys; print(sys.platform)"], capture_output=True, text=True)
try:
    mx.set_wired_limit(1 << 60)
    refused = False
except ValueError:
    refused = True
print(json.dumps({
    "platform": [sys.platform, platform.system(), platform.machine(), platform.mac_ver()[0]],
    "child": child.stdout.strip(),
    "lacking": [name for name in ("posix_fadvise", "sched_getaffinity", "O_DIRECT") if hasattr(os, name)],
    "proc": Path("/proc/self/status").exists(),
    "default": sorted(mx.device_info()), "gpu": mx.device_info(mx.gpu), "metal": mx.metal.is_available(),
    "device": str(mx.default_device()), "refused": refused, "sum": mx.sum(mx.arange(4)).item(),
    "machine": [system.processor_name(), system.system_name(), system.installed_memory(), system.free_memory()],
    "working_set": gpu.working_set(), "forgets": files.can_forget(),
}))
"""


def test_a_process_on_a_mac() -> None:
    around = {**os.environ, **environment()}
    around["PYTHONPATH"] += os.pathsep + str(CHECKOUT)
    script = CHECKOUT / "tests" / "mac" / "asked.py"  # what asks is of this project by its place
    done = subprocess.run(
        [sys.executable, "-c", f"exec(compile({ASKED!r}, {str(script)!r}, 'exec'))"],
        capture_output=True, text=True, env=around, cwd=CHECKOUT,
    )  # fmt: skip
    told = json.loads(done.stdout or "null")
    assert told == {
        "platform": ["darwin", "Darwin", "arm64", "15.5"], "child": "darwin", "lacking": [], "proc": False,
        "default": ["architecture", "device_name"], "gpu": GPU, "metal": True, "device": "Device(cpu, 0)",
        "refused": True, "sum": 6, "machine": ["Apple M1", "macOS 15.5 arm64", 8 << 30, 16384 * 180_500],
        "working_set": 5461 << 20, "forgets": False,
    }, done.stderr  # fmt: skip


def test_what_cannot_be_pretended_is_little_and_there() -> None:
    assert len(CANNOT) <= 12 and all(CANNOT.values())
    for name in CANNOT:
        assert (CHECKOUT / name.partition("::")[0]).exists(), name


@pytest.mark.parametrize("part", [PART, pytest.param(MORE, marks=pytest.mark.soak)], ids=["part", "more"])
def test_a_part_of_the_suite(part: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", "--as-mac", "-q", "-p", "no:cacheprovider", *part]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
