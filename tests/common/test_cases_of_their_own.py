"""Free memory in control groups, and threads that fail."""

from threading import Barrier
from time import sleep

import pytest

from memory_efficient_attention_pytorch.common import sizes
from memory_efficient_attention_pytorch.common.threads import in_threads

V2, V1 = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@pytest.fixture
def rooms(monkeypatch, tmp_path):

    def of(membership, groups, names):
        cgroup = tmp_path / "cgroup"
        cgroup.write_text(membership)
        for place, (limit, used, cached) in groups.items():
            group = tmp_path / place
            group.mkdir(parents=True, exist_ok=True)
            (group / names[0]).write_text(f"{limit}\n")
            (group / names[1]).write_text(f"{used}\n")
            (group / "memory.stat").write_text(f"{names[2]} {cached}\n")
        places = {"/proc/self/cgroup": cgroup, "/sys/fs/cgroup": tmp_path, "/sys/fs/cgroup/memory": tmp_path / "memory"}
        monkeypatch.setattr(sizes, "Path", lambda name: places[name])
        return sizes._control_group_rooms()

    return of


def test_a_group_above_may_leave_less(rooms):
    assert rooms("0::/pod/job\n", {"pod/job": ("max", 7, 0), "pod": (20, 9, 1)}, V2) == [2**63, 12]
    assert rooms("0::/pod/job\n", {"pod/job": (30, 7, 0), "pod": (20, 9, 1)}, V2) == [2**63, 23, 12]


def test_a_group_that_is_over_its_limit_has_no_room(rooms):
    assert rooms("0::/job\n", {"job": (10, 14, 1)}, V2) == [2**63, 0]
    assert rooms("0::/job\n", {"job": (10, 3, 5)}, V2) == [2**63, 10]  # read one after the other


def test_only_the_group_of_the_memory_controller_counts(rooms):
    groups = {"memory/job": (30, 7, 0), "memory/cpus": (8, 7, 0)}
    assert rooms("4:cpu,cpuacct:/cpus\n5:memory:/job\n", groups, V1) == [2**63, 23]


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
