"""CPU quotas: files of real machines in a temporary folder, and a real quota if one can be set here."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import cgroups

from distributed.host import cpu_quota as module
from distributed.host.cpu_quota import available_cpus, cpu_quota
from distributed.topology import Topology

ROOT = Path(__file__).parents[2]


def v2(mount: Path, root: str = "/") -> str:
    return f"31 23 0:26 {root} {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def v1(mount: Path, controllers: str, root: str = "/") -> str:
    return f"32 31 0:29 {root} {mount} rw,relatime - cgroup cgroup rw,{controllers}"


class Machine:
    """A `/proc/self` and mounted control groups in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.proc, self.mount = folder, folder / "proc", folder / "cgroup"
        self.proc.mkdir()

    def write(self, groups: list[str], mounts: list[str]) -> None:
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        (self.proc / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))

    def limit(self, group: str, quota: object, period: object = 100000, *, version: int = 2) -> None:
        folder = self.mount / group
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (folder / "cpu.max").write_text(f"{quota} {period}\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text(f"{period}\n")

    @property
    def quota(self) -> float | None:
        return cpu_quota(self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("limits", "quota"),
    [
        ({}, None),
        ({"a/b": "max"}, None),
        ({"a/b": 150000}, 1.5),
        ({"a": 50000, "a/b": "max"}, 0.5),
        ({"a": "max", "a/b": 400000}, 4.0),
        ({"a": 200000, "a/b": 400000}, 2.0),
        ({"": 300000}, 3.0),
        ({"other": 100000, "a/b/c": 100000}, None),
        ({"a/b": "nonsense"}, None),
        ({"a/b": -1}, None),
        ({"a/b": 0}, None),
    ],
)
def test_cgroup_v2_applies_the_smallest_parent_quota(machine: Machine, limits: dict, quota: float | None) -> None:
    machine.write(["0::/a/b"], [v2(machine.mount)])
    for group, limit in limits.items():
        machine.limit(group, limit)
    assert machine.quota == quota


@pytest.mark.parametrize(
    ("limits", "quota"),
    [({}, None), ({"a/b": -1}, None), ({"a/b": 100000}, 1.0), ({"a": 250000, "a/b": -1}, 2.5), ({"other": 1}, None)],
)
def test_cgroup_v1_applies_the_smallest_parent_quota(machine: Machine, limits: dict, quota: float | None) -> None:
    machine.write(
        ["9:name=systemd:/x", "4:cpu,cpuacct:/a/b", "3:cpuset:/other", "0::/"],
        [v1(machine.mount / "no", "cpuset"), v1(machine.mount / "nor", "cpuacct"), v1(machine.mount, "cpu,cpuacct")],
    )
    for group, limit in limits.items():
        machine.limit(group, limit, version=1)
    assert machine.quota == quota


def test_mixed_cgroup_versions_apply_the_smaller_quota(machine: Machine) -> None:
    machine.write(["1:cpu:/one", "0::/two"], [v1(machine.mount, "cpu"), v2(machine.mount)])
    machine.limit("one", 300000, version=1)
    machine.limit("two", 200000)
    assert machine.quota == 2.0


def test_quota_is_relative_to_the_period(machine: Machine) -> None:
    machine.write(["0::/"], [v2(machine.mount)])
    machine.limit("", 10000, period=5000)
    assert machine.quota == 2.0


@pytest.mark.parametrize(
    ("root", "path", "where"),
    [
        ("/", "/", ""),  # a container with a namespace of its own
        ("/docker/1234", "/docker/1234", ""),  # without one: the host's path, and only its own subtree mounted
        ("/docker/1234", "/docker/1234/inner", "inner"),
        ("/kubepods/pod7", "/kubepods/pod7/c/d", "c"),
        ("/elsewhere", "/docker/1234", ""),
        ("/", "/../outside", ""),
        ("/..", "/", ""),
    ],
)
def test_container_reads_its_own_group(machine: Machine, root: str, path: str, where: str) -> None:
    machine.write([f"0::{path}"], [v2(machine.mount, root)])
    machine.limit(where, 100000)
    assert machine.quota == 1.0


def test_mount_point_may_contain_a_space(machine: Machine) -> None:
    machine.mount = machine.folder / "control groups"
    machine.write(["0::/a b"], [v2(Path(str(machine.mount).replace(" ", "\\040")))])
    machine.limit("a b", 100000)
    assert machine.quota == 1.0


@pytest.mark.parametrize("text", ["", "\n", "0", "0::", ":::", "x:cpu", "\0\0", "0::/a\n" * 3])
def test_malformed_files_are_no_quota(machine: Machine, text: str) -> None:
    for mounts in ("", text, "1 2 3 - cgroup2", v2(machine.mount)):
        machine.write([text], [mounts])
        assert machine.quota is None


def test_missing_files_are_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "cpus"), [(None, 8), (16.0, 8), (4.0, 4), (1.5, 2), (1.4, 1), (0.1, 1), (2.49, 2), (7.9, 8)]
)
def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, cpus: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(module, "cpu_quota", lambda: quota)
    assert available_cpus() == Topology().threads(0) == cpus
    assert Topology(local_world_size=2).threads(0) == max(1, cpus // 2)
    assert Topology(local_world_size=16).threads(0) == 1
    assert Topology().threads(7) == 7


def test_cpus_are_counted_in_one_module() -> None:
    counts = re.compile(r"sched_getaffinity|cpu_count\(")
    files = [file for folder in ("distributed", "launch") for file in (ROOT / folder).rglob("*.py")]
    assert [file.name for file in files if counts.search(file.read_text())] == ["cpu_quota.py"]


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of this machine with a quota of one CPU."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one CPU")
    candidates = {cgroups.ROOT / "cpu": "cpu.cfs_quota_us", cgroups.ROOT: "cpu.max"}
    yield from cgroups.limited_group(candidates, 100_000, noun="control group")


def test_real_quota_is_detected(group: Path) -> None:
    code = (
        f"open({str(group / 'cgroup.procs')!r}, 'w').write('0'); from launch.doctor.probe import available_cpus as doctor; "
        "from distributed.topology import Topology; print(doctor(), Topology().threads(0), Topology().threads(3))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.stdout == "1 1 3\n", found.stderr
