"""Beside other work OpenMP's threads sleep while they wait: noticed, begun, ended, and nobody else is changed."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from memory_efficient_attention_pytorch import dot_product_attention, plan
from memory_efficient_attention_pytorch.common import contention
from memory_efficient_attention_pytorch.common.contention import INTERVAL, QUIET, SHARE, Watch, waited
from memory_efficient_attention_pytorch.torch_internals import Capability, openmp

pytestmark = pytest.mark.skipif(
    not any(waited().values()) or len(os.sched_getaffinity(0)) < 2,
    reason="the system does not tell how long a thread has waited for a core, or has only one",
)

# How often threads slept while one product after another was shared, each after a pause far shorter than OpenMP's spin.
SLEEPS = """
import resource, sys, time, torch
from memory_efficient_attention_pytorch.common.contention import Watch
torch.set_num_threads(2)
x = torch.zeros(2**17)
x.add_(1)
watch = Watch()
if sys.argv[1:]:
    watch._share = lambda: float(not left)
    left = False
    watch._invite(2, 2)
    assert watch.crowded
if sys.argv[1:] == ["left"]:
    left = True
    watch._guest.join()
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
until = time.perf_counter() + float(sys.argv[1])
busy = f"import time\\nuntil = time.time() + {sys.argv[1]}\\nwhile time.time() < until: pass"
others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in os.sched_getaffinity(0)]
try:
    while time.perf_counter() < until and not _watch(os.getpid()).crowded:
        dot_product_attention(q, q, q)
finally:
    for other in others:
        other.kill()
print(_watch(os.getpid()).crowded)
"""


# Attention beside other work, in a process that may start one more thread. GNU's OpenMP ends one where it cannot.
LIMITED = """
import os, resource, time, torch
from memory_efficient_attention_pytorch import dot_product_attention
from memory_efficient_attention_pytorch.common import contention
torch.set_num_threads(2)
q = torch.randn(1, 2, 512, 64)
dot_product_attention(q, q, q)
most = len(os.listdir("/proc/self/task")) + 1
resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
if os.getuid() == 0:  # who is exempt
    os.setgid(65500)
    os.setuid(65500)
contention.SHARE = -1.0
for _ in range(8):
    dot_product_attention(q, q, q)
    time.sleep(contention.INTERVAL / 2)
watch = contention._watch(os.getpid())
print(watch._possible, watch.crowded)
"""


def run(script, *arguments, **variables):
    told = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in told} | variables
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def clock(monkeypatch):
    """Two threads, and a time and waits that the test sets."""

    class Clock:
        now, waited, always = 100.0, {"1": 5.0, "2": 7.0}, 0.0

        def passes(self, seconds, **waits):
            self.now += seconds
            self.waited = self.waited | {name[1:]: self.waited.get(name[1:], 0) + time for name, time in waits.items()}

        def read(self):
            if self.always:
                self.passes(0, t1=self.always)
            return self.waited

    clock, threads = Clock(), torch.get_num_threads()
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(contention.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(contention, "waited", clock.read)
    torch.set_num_threads(2)
    yield clock
    clock.always = 0
    torch.set_num_threads(threads)


def test_a_guest_comes_where_a_thread_waits_and_leaves_where_none_does(clock):
    watch = Watch()
    clock.passes(1, t1=SHARE * 0.9, t2=SHARE * 0.9)
    watch.look()
    assert not watch.crowded
    clock.passes(INTERVAL * 0.9, t1=INTERVAL)
    watch.look()
    assert not watch.crowded, "the last reading is too new"
    clock.passes(INTERVAL * 0.2)
    clock.always = INTERVAL
    watch.look()
    guest = watch._guest
    guest.join(INTERVAL * QUIET * 2)
    assert watch.crowded
    clock.passes(1)
    watch.look()
    assert watch._guest is guest
    clock.always = 0
    guest.join(20)
    assert not watch.crowded


def test_threads_that_are_new_or_have_ended_count_from_when_they_are_seen(clock):
    watch = Watch()
    clock.passes(1, t3=50.0)
    watch.look()
    assert not watch.crowded
    del clock.waited["1"]
    clock.passes(1)
    watch.look()
    assert not watch.crowded


@pytest.mark.parametrize("used", [True, False])
def test_nobodys_number_of_threads_changes(clock, used):
    """Also where the caller has not used its own yet, and threads that begin meanwhile."""

    def caller():
        torch.set_num_threads(3)
        if used:
            torch.get_num_threads()
        watch = Watch()
        watch._invite(3, 2)
        with ThreadPoolExecutor(1) as later:
            return watch.crowded, torch.get_num_threads(), later.submit(torch.get_num_threads).result()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(caller).result() == (True, 3, 3)


@pytest.mark.parametrize(
    "case", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "nothing known", "another OpenMP", "address space", "many CPUs"]
)
def test_where_it_does_nothing(clock, monkeypatch, case):
    if case == "nothing known":
        clock.waited = {}
    elif case == "address space":
        monkeypatch.setattr("resource.getrlimit", lambda which: (2**40, 2**40))
    elif case == "another OpenMP":
        loaded = b"libgomp-1.so libiomp5.so"
        monkeypatch.setattr(openmp, "open", lambda path, mode: io.BytesIO(loaded), raising=False)
        monkeypatch.setattr(contention, "set_own_threads", Capability("afresh", openmp.set_own_threads._find))
    elif case == "many CPUs":
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(5))
    else:
        monkeypatch.setenv(case, "ACTIVE" if case == "OMP_WAIT_POLICY" else "1000")
    watch = Watch()
    clock.passes(1, t1=0.9)
    watch.look()
    assert watch._guest is None


def test_a_process_that_cannot_start_threads_goes_on(clock, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    watch = Watch()
    with monkeypatch.context() as none:
        none.setattr(contention.Thread, "start", fail)
        clock.passes(1, t1=0.9)
        watch.look()
        assert not watch.crowded
    clock.passes(1, t1=0.9)
    watch.look()
    assert not watch.crowded, "it does not try again"


def test_a_process_with_a_limit_of_threads_goes_on():
    assert run(LIMITED) == ["False", "False"]


def test_a_mapped_file_whose_name_is_no_utf8(tmp_path):
    """As every checkpoint is that lies in a directory with such a name."""
    script = (
        "import mmap, sys, torch\nfrom memory_efficient_attention_pytorch import dot_product_attention\n"
        "file = open(sys.argv[1].encode() + b'\\xe9', 'wb+')\nfile.write(b'x' * 4096)\nfile.flush()\n"
        "mapped = mmap.mmap(file.fileno(), 4096)\ntorch.set_num_threads(2)\nq = torch.randn(1, 1, 4, 8)\n"
        "dot_product_attention(q, q, q)\nprint('done')"
    )
    assert run(script, str(tmp_path / "mapped")) == ["done"]


def test_who_looks(monkeypatch):
    looks = []
    monkeypatch.setattr(contention.Watch, "look", lambda watch: looks.append(watch))
    q = torch.randn(1, 1, 4, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        dot_product_attention(q, q, q)
        assert not looks
        torch.set_num_threads(2)
        dot_product_attention(q, q, q)
        assert len(looks) == 1
        plan({"num_tokens": 16, "max_seq_len": 8, "dim": 16, "depth": 1, "heads": 1}, batch_size=1, seq_len=8)
        assert len(looks) == 1
    finally:
        torch.set_num_threads(threads)


def test_threads_sleep_while_they_wait():
    """A count: a few of 200 waits may end in sleep beside other work, with the guest almost all do."""
    (usual, _), (crowded, threads), (left, _) = (map(int, run(SLEEPS, *how)) for how in ((), ("crowd",), ("left",)))
    assert crowded > 180 > 120 > max(usual, left), (usual, crowded, left)
    assert threads == 2


def test_other_work_is_noticed():
    assert run(BUSY, "60") == ["True"]
    assert run(BUSY, "2", GOMP_SPINCOUNT="100000") == ["False"]
