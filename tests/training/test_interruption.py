"""Signals that ask a run to end."""

import os
import signal

import pytest

from memory_efficient_attention_pytorch.training.interruption import Interruption


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGTERM
        interruption._noted_at -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
