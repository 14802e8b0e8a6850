"""What a process that trains holds of the memory that it has freed."""

import platform
import subprocess
import sys

import pytest

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
