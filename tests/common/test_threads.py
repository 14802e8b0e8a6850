"""Parts of a pass in threads: each once, single-threaded inside, whatever happens there, and nobody else is changed."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from time import sleep

import pytest
import torch

from memory_efficient_attention_pytorch.common.threads import alone, in_threads
from tests.memory.live_bytes import LiveBytes


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def note(seen, do=lambda part: None):
    """A worker that notes for each part which thread computes it, and does something."""

    def worker():
        def compute(part):
            seen.append((part, threading.get_ident(), torch.get_num_threads()))
            do(part)

        return compute

    return worker


def test_each_part_is_computed_once_by_threads_of_their_own():
    seen, together = [], threading.Barrier(2)
    in_threads(range(20), note(seen, lambda part: part >= 18 and together.wait(10)))
    assert sorted(part for part, *_ in seen) == list(range(20))
    assert len({thread for _, thread, _ in seen} - {threading.get_ident()}) == 2
    assert {count for *_, count in seen} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("case", ["fewer parts", "one thread", "not apart", "a dispatch mode"])
def test_the_calling_thread_computes(case):
    if case == "one thread":
        torch.set_num_threads(1)
    seen = []
    in_worker = partial(in_threads, range(1 if case == "fewer parts" else 4), note(seen), apart=case != "not apart")
    if case == "a dispatch mode":
        with LiveBytes():
            in_worker()
    else:
        in_worker()
    assert {thread for _, thread, _ in seen} == {threading.get_ident()}


def test_an_exception_is_the_callers_and_ends_the_rest():
    seen = []

    def fail(part):
        if part == 3:
            raise LookupError("part 3")

    with pytest.raises(LookupError, match="part 3"):
        in_threads(range(10_000), note(seen, fail))
    assert len(seen) < 10_000
    with pytest.raises(LookupError, match="at the start"):
        in_threads(range(4), lambda: (_ for _ in ()).throw(LookupError("at the start")))
    in_threads(range(4), note(again := []))
    assert len(again) == 4


def test_modes_inside():
    found = []
    for mode in (torch.inference_mode(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            in_threads(range(2), note([], lambda _: found.append((torch.ones(1) @ torch.ones(1)).dtype)))
            asked = torch.is_inference_mode_enabled()
            in_threads(range(2), note([], lambda _, asked=asked: found.append(torch.ones(1).is_inference() == asked)))
            in_threads(range(2), note([], lambda _: found.append(not torch.is_grad_enabled())))
    assert set(found) == {torch.float32, True}


def test_callers_at_the_same_time_and_their_numbers_of_threads():
    def caller(threads):
        torch.set_num_threads(threads)
        totals = []
        for _ in range(5):
            parts = []
            in_threads(range(8), note([], parts.append))
            totals.append(sorted(parts))
        return totals, torch.get_num_threads()

    with ThreadPoolExecutor(4) as pool:
        for threads, (totals, after) in zip((1, 2, 3, 2), pool.map(caller, (1, 2, 3, 2)), strict=True):
            assert totals == [list(range(8))] * 5
            assert after == threads
    assert torch.get_num_threads() == 2


def test_a_thread_that_begins_later_has_the_callers_number():
    in_threads(range(4), note([]))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


@pytest.mark.parametrize("begun", [True, False])
def test_a_function_alone_changes_nobodys_number_of_threads(begun):
    """Also where the caller has not used its own number yet, and would take one that another thread has set."""

    def caller():
        torch.set_num_threads(3)
        if begun:
            torch.get_num_threads()
        inside = alone(torch.get_num_threads)
        with ThreadPoolExecutor(1) as later:
            return inside, torch.get_num_threads(), later.submit(torch.get_num_threads).result()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(caller).result() == (1, 3, 3)


def test_measuring_products_first_of_all_leaves_the_number_of_threads():
    script = """
import torch
from memory_efficient_attention_pytorch.common.products import onednn_is_faster
torch.set_num_threads(3)
onednn_is_faster()
print(torch.get_num_threads())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (run.stdout.strip(), run.returncode) == ("3", 0), run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_after_a_fork():
    in_threads(range(4), note([]))
    child = os.fork()
    if child == 0:
        seen = []
        in_threads(range(4), note(seen))
        os._exit(len(seen))
    done = threading.Timer(20, os.kill, (child, 9))
    done.start()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    done.cancel()


def test_nothing_runs_any_more_when_an_exception_is_raised(two_threads):
    both, done = Barrier(2), []

    def compute(part):
        both.wait(10)
        if part == 0:
            raise LookupError
        sleep(0.3)
        done.append(part)

    with pytest.raises(LookupError):
        in_threads(range(2), lambda: compute)
    assert done == [1]
