"""What every test shares: the CPU as the oracle, the folder of reference material, where there is one, and a pretended
Mac (`--as-mac`).

Knows the place of the checkout. Knows nothing of the model.
"""

import gc
import signal
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import figures, fused
from tests.mac import pretended

AS_MAC = "--as-mac" in sys.argv or pretended.is_pretended()
if AS_MAC:
    pretended.pretend()  # before anything asks what it is on

import mlx.core as mx  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[1]

mx.set_default_device(mx.cpu)
fused.parsed_once()
# Started in the background of a script, this process and its children would ignore Ctrl-C, which the tests press.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Examples are drawn the same way in every run, so that a red test stays red until it is mended; `make soak` draws more,
# and others each time (tests/soak.py).
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None, max_examples=30)
hypothesis.settings.register_profile("soak", deadline=None, database=None, max_examples=200, print_blob=True)
hypothesis.settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-mac", action="store_true", help="run as if this were a Mac (tests/mac/pretended.py)")
    parser.addoption("--llama-cpp", metavar="FOLDER", help="hold GGUFs against llama.cpp, built into FOLDER if need be")
    parser.addoption("--writers", metavar="PYTHON", help="read what other libraries write, run by that Python")


def pytest_report_header() -> str | None:
    return "as if this were a Mac: nothing is computed by a GPU" if AS_MAC else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if AS_MAC else ():
        for name, reason in pretended.CANNOT.items():
            if item.nodeid.startswith(name):
                item.add_marker(pytest.mark.skip(reason=f"cannot be pretended: {reason}"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays: a search for garbage, which many tests ask for, need not go through it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker's figures go to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = figures.measured


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, difference in getattr(node, "workeroutput", {}).get("figures", {}).items():
        figures.measured[name] = max(figures.measured.get(name, 0.0), difference)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures of docs/EXACTNESS.md, as they are here and now."""
    if figures.measured:
        terminalreporter.section("largest differences")
        for line in figures.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: reference programs, published configs, templates and encodings."""
    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' with the reference material beside the checkout")
    return folder
