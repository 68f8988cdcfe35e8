"""What differs from one system to the next is asked in mlx_qwen35/machine/ alone, by the package and the benchmarks."""

import re

from tests.conftest import CHECKOUT

ASKS = re.compile(
    r"sys\.platform|os\.uname|platform\.(system|mac_ver)\(|[\"']/proc/|posix_fa|sched_(get|set)affinity|O_DIRECT|"
    r"\bfcntl\b|F_NOCACHE|F_FULLFSYNC|\.fsync\(|\.ru_maxrss|\bsysctl\b.*-n|vm_stat|\.r?glob\(|\.iterdir\(|"
    r"mx\.device_info\(|mx\.set_(wired|cache)_limit\("
)
ALLOWED = {  # and what a line there may hold
    "mlx_qwen35/session/file.py": ".glob(",  # names of its own, which begin with a dot
    "benchmarks/": "glob(",  # folders that benchmarks wrote themselves
    "benchmarks/measuring.py": "platform.system(",  # the words of a record
}


def test_only_one_place_asks() -> None:
    found = []
    for room in ("mlx_qwen35", "benchmarks"):
        for path in sorted((CHECKOUT / room).rglob("*.py")):
            name = path.relative_to(CHECKOUT).as_posix()
            allowed = [held for where, held in ALLOWED.items() if name.startswith(where)]
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if ASKS.search(line) and not any(held in line for held in allowed):
                    found.append(f"{name}:{number}: {line.strip()}")
    there = [line for line in found if line.startswith("mlx_qwen35/machine/")]
    elsewhere = [line for line in found if line not in there]
    assert len(there) > 10 and not elsewhere, "ask mlx_qwen35/machine/:\n" + "\n".join(elsewhere)
