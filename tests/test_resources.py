"""Memory that a process can still take: what the machine has free, and what limits leave of it."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nsds_gguf.system import resources
from nsds_gguf.system.cgroups import memory_left_bytes

UNLIMITED_V1 = 9223372036854771712


def group_v2(folder: Path, limit: object, usage: int, inactive: int = 0, active: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file {active}\n")


def group_v1(folder: Path, limit: int, usage: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    stat = f"inactive_file 7\ntotal_inactive_file {inactive}\ntotal_active_file 5\n"
    (folder / "memory.stat").write_text(stat)


def says(root: Path, *lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(line + "\n" for line in lines))
    return root


def test_the_tightest_group_above_counts_and_page_cache_is_free(tmp_path):
    mount = says(tmp_path, "0::/batch/job") / "sys/fs/cgroup"
    group_v2(mount / "batch/job", "max", 900)
    group_v2(mount / "batch", 1000, 900, inactive=200, active=30)
    (mount / "memory.stat").write_text("inactive_file 5\n")  # the root has statistics and no limit
    assert memory_left_bytes(tmp_path) == 330
    group_v2(mount / "batch/job", 700, 650, inactive=10)
    assert memory_left_bytes(tmp_path) == 60


def test_a_container_sees_its_group_as_the_root(tmp_path):
    group_v2(says(tmp_path, "0::/") / "sys/fs/cgroup", 500, 100)
    assert memory_left_bytes(tmp_path) == 400


def test_a_group_above_its_limit_leaves_nothing(tmp_path):
    group_v2(says(tmp_path, "0::/") / "sys/fs/cgroup", 500, 600)
    assert memory_left_bytes(tmp_path) == 0


def test_version_1_and_a_path_of_the_host(tmp_path):
    root = says(tmp_path, "5:devices:/docker/abc", "4:memory:/docker/abc", "0::/")
    group_v1(root / "sys/fs/cgroup/memory", 1000, 400, 50)  # docker mounts the group itself here
    assert memory_left_bytes(root) == 655
    group_v1(root / "sys/fs/cgroup/memory", UNLIMITED_V1, 400, 50)
    assert memory_left_bytes(root) == UNLIMITED_V1 - 400 + 55


@pytest.mark.parametrize("lines", [(), ("0::/",), ("4:cpu:/x",)], ids=["no groups", "no limit", "no memory group"])
def test_no_limit(tmp_path, lines):
    assert memory_left_bytes(says(tmp_path, *lines)) is None


def test_no_proc(tmp_path):
    assert memory_left_bytes(tmp_path) is None


@pytest.mark.parametrize(("group", "address_space", "wanted"), [(None, None, 30), (20, None, 20), (None, 10, 10),
                                                                (40, 50, 30), (0, 10, 0)])  # fmt: skip
def test_the_least_of_all_counts(monkeypatch, group, address_space, wanted):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=30))
    monkeypatch.setattr(resources, "memory_left_bytes", lambda: group)
    monkeypatch.setattr(resources, "_address_space_left", lambda: address_space)
    assert resources.available_memory_bytes() == wanted
