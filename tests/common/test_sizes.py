"""Sizes are read as people write them, nonsense is refused, and what memory there is comes from the system."""

import pytest
import torch

from memory_efficient_attention_pytorch.common import sizes
from memory_efficient_attention_pytorch.common.sizes import available_memory, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8000M", 8 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("64KiB", 2**16),
        (".5T", 5 * 10**11),
        ("4096", 4096),
        (4096, 4096),
        ("100b", 100),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "8XB", "-3G", 0, "0GB", -1, "8i", "nan", float("nan"), float("inf"), True, None])
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError, match="memory-budget: expected a size above zero such as 8GB, 8GiB or 8000M"):
        parse_size(text, "memory-budget")


def test_sizes_are_written():
    assert [format_size(n) for n in (0, 1023, 1536, 150 * 2**20, 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "150 MiB",
        "1 TiB",
    ]


def test_control_groups_bound_what_is_available(monkeypatch):
    free = available_memory()
    assert 0 < free < 2**50
    monkeypatch.setattr(sizes, "_control_group_rooms", lambda: [1000])
    assert available_memory("cpu") == 1000


VERSIONS = {
    "0::/job": {"memory.max": 8, "memory.current": 7, "memory.stat": "anon 2\ninactive_file 4"},
    "5:cpu,memory:/job": {
        **{"memory.limit_in_bytes": 8, "memory.usage_in_bytes": 7},
        "memory.stat": "inactive_file 1\ntotal_inactive_file 4",
    },
}


@pytest.mark.parametrize(("membership", "files"), VERSIONS.items(), ids=["2", "1"])
def test_files_in_the_cache_make_room(membership, files, monkeypatch, tmp_path):
    """A process that has read much has not less memory: the system drops cached files when it is asked for memory."""
    cgroup = tmp_path / "cgroup"
    cgroup.write_text(membership + "\n")
    group = tmp_path / ("job" if membership.startswith("0") else "memory/job")
    group.mkdir(parents=True)
    for name, value in files.items():
        (group / name).write_text(f"{value}\n")
    places = {"/proc/self/cgroup": cgroup, "/sys/fs/cgroup": tmp_path, "/sys/fs/cgroup/memory": tmp_path / "memory"}
    monkeypatch.setattr(sizes, "Path", lambda name: places[name])
    assert sizes._control_group_rooms() == [2**63, 5]
    (group / "memory.stat").unlink()
    assert sizes._control_group_rooms() == [2**63, 1]


def test_an_unknown_device_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine's CUDA device does tell")
    with pytest.raises(NotImplementedError, match="give a budget"):
        available_memory("cuda")


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
