"""CPUs available to this process: its affinity, limited by the quota of its cgroups, e.g. in a container. Imports no torch.

The affinity does not include the quota. If more threads run than the quota allows, the kernel throttles all of them until the
period ends, and each step waits for the slowest.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_V2, _V1 = "cgroup2", "cgroup"


def usable_cpus() -> int:
    """Return the number of CPUs in this process's affinity, ignoring the quota."""
    return len(os.sched_getaffinity(0))


def use_first_cpus(count: int) -> None:
    """Restrict this process to the first CPUs of its affinity."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def within_quota(cpus: int) -> int:
    """Return `cpus`, or the rounded CPU quota of this process if that is less. At least 1."""
    quota = cpu_quota()
    return cpus if quota is None else min(cpus, max(1, int(quota + 0.5)))


def available_cpus() -> int:
    """Return the number of CPUs that this process may keep busy."""
    return within_quota(usable_cpus())


def quota_note() -> str:
    """Describe how a quota limits the number of CPUs; empty if it does not."""
    if (available := available_cpus()) == usable_cpus():
        return ""
    return f"CPU quota {cpu_quota() or 0:g}: threads for {available} of {usable_cpus()} CPUs"


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """Return the smallest quota, in CPUs, of this process's cgroups and their parents; None if no quota is set.

    Args:
        proc: folder with the files `cgroup` and `mountinfo`.
    """
    limits = [limit for version, group in _groups(proc) if (limit := _limit(version, group)) is not None]
    return min(limits, default=None)


def _groups(proc: Path) -> Iterator[tuple[str, Path]]:
    """Yield version and folder of each cgroup that this process's CPU time is charged to, up to the mount point."""
    paths: dict[str, str] = {}
    for line in _lines(proc / "cgroup"):  # HIERARCHY:CONTROLLERS:PATH; version 2 is "0::PATH"
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "cpu" in controllers.split(","):
            paths[_V1] = path
        elif number == "0" and not controllers:
            paths[_V2] = path
    for line in _lines(proc / "mountinfo"):  # ID PARENT DEVICE ROOT MOUNT OPTIONS [MORE] - TYPE SOURCE OPTIONS
        before, _, after = (fields.split() for fields in line.partition(" - "))
        if len(before) < 5 or len(after) < 3 or after[0] not in paths:
            continue
        if after[0] == _V1 and "cpu" not in after[2].split(","):
            continue
        root, mount = (Path(_unescape(field)) for field in before[3:5])
        inside = Path(paths[after[0]])
        # A container without a cgroup namespace sees the host's path, of which only a subtree is mounted.
        below = inside.relative_to(root) if inside.is_relative_to(root) and ".." not in inside.parts else Path()
        yield from ((after[0], mount / folder) for folder in (below, *below.parents))


def _limit(version: str, group: Path) -> float | None:
    if version == _V2:
        fields = " ".join(_lines(group / "cpu.max")).split()
    else:
        fields = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    try:
        quota, period = (int(field) for field in fields)  # no limit is "max" in version 2, -1 in version 1
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(field: str) -> str:
    """Decode a path in mountinfo, where a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
