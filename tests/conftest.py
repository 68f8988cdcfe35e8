"""What every test shares: the CPU as the oracle, and the folder of reference material, where there is one.

Knows the place of the checkout. Knows nothing of the model.
"""

import signal
from pathlib import Path

import hypothesis
import mlx.core as mx
import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

mx.set_default_device(mx.cpu)
# Started in the background of a script, this process and its children would ignore Ctrl-C, which the tests press.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Examples are drawn the same way in every run, so that a red test stays red until it is mended.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: reference programs, published configs, templates and encodings."""
    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' with the reference material beside the checkout")
    return folder
