"""Shared set-up: one way to import the tests' own helpers, fixed seeds, repeatable property tests."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Under --import-mode=importlib nothing puts the helpers on the path: `from tests.reference import ...` needs the root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A shell's job in the background ignores it, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests are small, and run side by side: a second thread would only wait for the first.
torch.set_num_threads(1)

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def onednn_is_faster(monkeypatch):
    """As on a CPU where it was measured to be."""
    from memory_efficient_attention_pytorch.common import products

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


@pytest.fixture(autouse=True)
def _accelerate_anew():
    """accelerate keeps the first choice of precision for as long as a process lives; not imported where no test did."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
