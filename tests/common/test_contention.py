"""Beside other work OpenMP's threads sleep while they wait: noticed, begun, ended, and nobody else is changed."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from memory_efficient_attention_pytorch import dot_product_attention, plan
from memory_efficient_attention_pytorch.common import contention
from memory_efficient_attention_pytorch.common.contention import INTERVAL, SHARE, Watch, waited

pytestmark = pytest.mark.skipif(not waited(), reason="the system does not tell how long a thread has waited for a core")

# How often threads slept while one product after another was shared, each after a pause far shorter than OpenMP's spin.
SLEEPS = """
import resource, sys, time, torch
from memory_efficient_attention_pytorch.common.contention import _crowd
torch.set_num_threads(2)
x = torch.zeros(2**17)
x.add_(1)
leave = _crowd() if "crowd" in sys.argv[1:] else None
if "left" in sys.argv[1:]:
    leave.set()
    time.sleep(0.5)
    x.add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
for _ in range(200):
    x.add_(1)
    until = time.perf_counter() + 2e-4
    while time.perf_counter() < until:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before, torch.get_num_threads())
"""

# Attention, again and again, beside a busy process for each core; prints how the process's threads wait after it.
BUSY = """
import os, subprocess, sys, time, torch
from memory_efficient_attention_pytorch import dot_product_attention
from memory_efficient_attention_pytorch.common.contention import _watch
torch.set_num_threads(2)
q = torch.randn(1, 8, 512, 64)
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
try:
    until = time.perf_counter() + 60
    while time.perf_counter() < until and not _watch(os.getpid()).crowded:
        dot_product_attention(q, q, q)
finally:
    for other in others:
        other.kill()
print(_watch(os.getpid()).crowded)
"""


def run(script, *arguments, **variables):
    told = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in told} | variables
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def guests():
    return [thread for thread in threading.enumerate() if thread.name == "contention"]


@pytest.fixture
def clock(monkeypatch):
    """Two threads, and a time and waits that the test sets."""

    class Clock:
        now, waited = 100.0, {"1": 5.0, "2": 7.0}

        def __call__(self):
            return self.now

        def passes(self, seconds, **waits):
            self.now += seconds
            self.waited = self.waited | {name[1:]: self.waited.get(name[1:], 0) + time for name, time in waits.items()}

    clock, threads = Clock(), torch.get_num_threads()
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(contention.time, "perf_counter", clock)
    monkeypatch.setattr(contention, "waited", lambda: clock.waited)
    torch.set_num_threads(2)
    yield clock
    torch.set_num_threads(threads)


def test_it_begins_where_a_thread_waits_and_ends_where_none_does(clock):
    watch = Watch()
    clock.passes(1, t1=SHARE * 0.9, t2=SHARE * 0.9)
    watch.look()
    assert not watch.crowded
    clock.passes(INTERVAL * 0.9, t1=INTERVAL)
    watch.look()
    assert not watch.crowded, "the last reading is too new"
    clock.passes(INTERVAL * 0.2)
    watch.look()
    (guest,) = guests()
    assert watch.crowded
    clock.passes(1, t2=SHARE * 1.1)
    watch.look()
    assert guests() == [guest]
    clock.passes(1)
    watch.look()
    assert not watch.crowded
    guest.join(10)
    assert not guests()


def test_threads_that_are_new_or_have_ended_count_from_when_they_are_seen(clock):
    watch = Watch()
    clock.passes(1, t3=50.0)
    watch.look()
    assert not watch.crowded
    del clock.waited["1"]
    clock.passes(1)
    watch.look()
    assert not watch.crowded


def test_numbers_of_threads_stay(clock):
    torch.set_num_threads(3)
    watch = Watch()
    clock.passes(1, t1=0.5)
    watch.look()
    with ThreadPoolExecutor(1) as later:
        assert (torch.get_num_threads(), later.submit(torch.get_num_threads).result()) == (3, 3)
    clock.passes(1)
    watch.look()
    assert not watch.crowded


@pytest.mark.parametrize("told", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "nothing known", "address space"])
def test_where_it_does_nothing(clock, monkeypatch, told):
    if told == "nothing known":
        clock.waited = {}
    elif told == "address space":
        monkeypatch.setattr("resource.getrlimit", lambda which: (2**40, 2**40))
    else:
        monkeypatch.setenv(told, "ACTIVE" if told == "OMP_WAIT_POLICY" else "1000")
    watch = Watch()
    clock.passes(1, t1=0.9)
    watch.look()
    assert not watch.crowded


def test_who_looks(monkeypatch):
    looks = []
    monkeypatch.setattr(contention, "_watch", lambda process: looks.append(process) or Watch())
    q = torch.randn(1, 1, 4, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        dot_product_attention(q, q, q)
        assert not looks
        torch.set_num_threads(2)
        dot_product_attention(q, q, q)
        assert looks == [os.getpid()]
        plan({"num_tokens": 16, "max_seq_len": 8, "dim": 16, "depth": 1, "heads": 1}, batch_size=1, seq_len=8)
        assert len(looks) == 1
    finally:
        torch.set_num_threads(threads)


def test_threads_sleep_while_they_wait():
    """A count: beside a busy process one of 200 waits may end in sleep, with the additional thread almost all do."""
    (usual, _), (crowded, threads), (left, _) = (
        map(int, run(SLEEPS, *how)) for how in ((), ("crowd",), ("crowd", "left"))
    )
    assert crowded > 180 > 120 > max(usual, left), (usual, crowded, left)
    assert threads == 2


def test_other_work_is_noticed():
    assert run(BUSY) == ["True"]
    assert run(BUSY.replace("+ 60", "+ 2"), GOMP_SPINCOUNT="100000") == ["False"]
