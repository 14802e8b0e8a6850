"""What is chosen for the machine, and what a process that trains holds of the memory that it has freed."""

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from memory_efficient_attention_pytorch.layers.working_set import splits
from memory_efficient_attention_pytorch.training.config import TrainConfig
from memory_efficient_attention_pytorch.training.resources import memory_now, memory_peak, pick_precision, resolve

CPU = torch.device("cpu")

HELD = """
import torch
from memory_efficient_attention_pytorch.training.resources import memory_now, return_freed_blocks

device = torch.device("cpu")
if {called}:
    return_freed_blocks()
torch.ones(5 << 20)  # 20 MiB, more than which glibc holds from here on
before = memory_now(device)
blocks = [torch.ones(3 << 19) for _ in range(4)]  # of 6 MiB
del blocks
print(memory_now(device) - before)
"""


def held(called, **environment):
    done = subprocess.run(
        [sys.executable, "-c", HELD.format(called=called)], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout) / 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_returned():
    assert held(called=False) > 20
    assert held(called=True) < 4
    # What the user said of the allocator stays.
    assert held(called=True, MALLOC_MMAP_THRESHOLD_=str(16 << 20), MALLOC_TRIM_THRESHOLD_=str(64 << 20)) > 20


KEPT = """
import torch
from memory_efficient_attention_pytorch.training.resources import keep_freed_blocks, memory_now

if {called}:
    keep_freed_blocks()
before = memory_now(torch.device("cpu"))
blocks = [torch.ones(3 << 21) for _ in range(5)]  # of 24 MiB, more than glibc holds before one was freed
del blocks
advised = sum(line.startswith("VmFlags") and " hg" in line for line in open("/proc/self/smaps"))
print(memory_now(torch.device("cpu")) - before, advised)
"""


def kept(called, **environment):
    """MiB of 120 freed ones that a process keeps, and the mappings for which Linux was asked for huge pages."""
    code = KEPT.format(called=called)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    found, advised = map(int, done.stdout.split())
    return found / 2**20, advised


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_kept_in_huge_pages():
    assert kept(called=False)[0] < 40
    found, advised = kept(called=True)
    assert found > 100
    assert advised or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    # What the user said of the allocator stays.
    assert kept(called=True, MALLOC_TRIM_THRESHOLD_=str(1 << 20))[0] < 40


def test_precision_follows_the_machine_and_the_launcher(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert pick_precision(TrainConfig(), CPU) == "fp32"
    assert pick_precision(TrainConfig(precision="bf16"), CPU) == "bf16"
    with pytest.raises(ValueError, match="fp16 needs an accelerator"):
        pick_precision(TrainConfig(precision="fp16"), CPU)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert pick_precision(TrainConfig(), CPU) == "bf16"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_has_its_own_precision_whatever_ran_before(precision):
    """accelerate refuses another one than its first: tests/conftest.py has it begin anew."""
    assert Accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision


def test_small_models_are_not_cut_and_large_ones_are():
    small = resolve(TrainConfig(), CPU)
    assert (small.head_chunks, small.ff_chunks, small.exact) == (1, 1, False)
    assert (small.reversible, small.keep_attention) == (True, False)
    shape = {"dim": 512, "heads": 8, "dim_head": 64, "seq_len": 65536, "batch_size": 1}
    large = resolve(TrainConfig(**shape), CPU)
    assert large.ff_chunks == 64
    assert large.heads % large.head_chunks == 0
    assert large.heads // large.head_chunks >= torch.get_num_threads()
    grouped = resolve(TrainConfig(**shape, kv_heads=2), CPU)
    assert grouped.head_chunks in splits(grouped.heads, grouped.kv_heads)
    asked = resolve(TrainConfig(**shape, head_chunks=1, ff_chunks=3, precision="bf16", keep_attention="cpu"), CPU)
    assert (asked.head_chunks, asked.ff_chunks, asked.exact, asked.keep_attention) == (1, 3, True, "cpu")


def test_memory_is_counted():
    before = memory_now(CPU)
    with mmap.mmap(-1, 50 << 20) as block:  # the allocator might reuse what earlier tests have freed
        block.write(bytes(50 << 20))
        assert memory_now(CPU) >= before + 40 * (1 << 20)
    assert memory_peak(CPU) >= before + 40 * (1 << 20)
