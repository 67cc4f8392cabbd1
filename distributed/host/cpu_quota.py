"""CPUs available to this process: its affinity, and the quota of its cgroups, e.g. of a container. Imports no torch.

The affinity does not show a quota. If more threads run than the quota allows, the kernel throttles all of them until the period
ends, and each step waits for the slowest.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_V2, _V1 = "cgroup2", "cgroup"


def usable_cpus() -> int:
    """CPUs that this process may run on, whatever part of their time it may have."""
    return len(os.sched_getaffinity(0))


def within_quota(cpus: int) -> int:
    """That many CPUs, or the quota of this process's control groups, rounded, if that is less; at least one."""
    quota = cpu_quota()
    return cpus if quota is None else min(cpus, max(1, int(quota + 0.5)))


def available_cpus() -> int:
    """CPUs whose time this process may have."""
    return within_quota(usable_cpus())


def quota_note() -> str:
    """Describes how a quota limits the number of CPUs; empty if it does not."""
    if (available := available_cpus()) == usable_cpus():
        return ""
    return f"CPU quota {cpu_quota() or 0:g}: threads for {available} of {usable_cpus()} CPUs"


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """The smallest quota of this process's groups and of all groups above them, in CPUs; None without one.

    Args:
        proc: the folder that holds `cgroup` and `mountinfo`.
    """
    limits = [limit for version, group in _groups(proc) if (limit := _limit(version, group)) is not None]
    return min(limits, default=None)


def _groups(proc: Path) -> Iterator[tuple[str, Path]]:
    """Version and folder of each group that this process's CPU time is charged to, up to the mount."""
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
        root, mount = (Path(_unescaped(field)) for field in before[3:5])
        inside = Path(paths[after[0]])
        # A container without a namespace of its own sees its host's path, of which only a part is mounted.
        below = inside.relative_to(root) if inside.is_relative_to(root) and ".." not in inside.parts else Path()
        yield from ((after[0], mount / part) for part in (below, *below.parents))


def _limit(version: str, group: Path) -> float | None:
    if version == _V2:
        words = " ".join(_lines(group / "cpu.max")).split()
    else:
        words = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    try:
        quota, period = (int(word) for word in words)  # "max" and -1: no limit
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    """A path of mountinfo, in which a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
