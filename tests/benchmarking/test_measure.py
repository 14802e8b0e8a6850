"""Measured peaks are those of the step alone, and an enforced limit is a limit."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak, zero_grads

MIB = 2**20


def double(mib):
    """Holds ``mib`` MiB; its step makes as much again, twice, one after the other."""
    held = torch.ones(mib, MIB // 4)

    def step():
        for _ in range(2):
            (held * 2).sum()

    return step


def fail():
    raise KeyError("nothing to build")


def test_reads_what_the_step_adds_and_no_more():
    small, large = (measure_peak(f"{__file__}:double", {"mib": mib}, threads=1) for mib in (64, 192))
    for measured, mib in ((small, 64), (large, 192)):
        assert abs(measured.held_bytes - mib * MIB) < 4 * MIB
        assert abs(measured.peak_bytes - mib * MIB) < 4 * MIB
    assert abs(large.peak_bytes - small.peak_bytes - 128 * MIB) < 2 * MIB


def test_limit_is_enforced():
    arguments = {"mib": 128}
    assert measure_peak(f"{__file__}:double", arguments, threads=1, limit_bytes=140 * MIB).peak_bytes > 120 * MIB
    with pytest.raises(MemoryError, match="ran out of memory"):
        measure_peak(f"{__file__}:double", arguments, threads=1, limit_bytes=120 * MIB)


def test_only_a_cpu_is_limited():
    with pytest.raises(ValueError, match="limit_bytes: expected None but on a CPU, got 1024"):
        measure_peak(f"{__file__}:double", {"mib": 1}, device="cuda", limit_bytes=1024)
    with pytest.raises(MemoryError):
        measure_peak(f"{__file__}:double", {"mib": 64}, device="cpu:0", threads=1, limit_bytes=1024)


def test_failures_carry_their_cause():
    with pytest.raises(RuntimeError, match="nothing to build"):
        measure_peak(f"{__file__}:fail")
    with pytest.raises(RuntimeError, match="target must be"):
        measure_peak("no_function_named")


def test_zero_grads_are_real_zeros_for_trainable_parameters():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert zero_grads(model).weight.grad.eq(0).all()
    assert model.bias.grad is None
