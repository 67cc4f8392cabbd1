"""Compares the nodes' reports: a table, and a line with the remedy for each fault of a node."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from distributed.runs.table import in_columns
from launch.doctor.reports import NodeReport

_CLOCK_SECONDS = 1.0
_SLOW = 0.25  # of the median pair's speed
_SMALLER_GPU = 0.95  # of the usual memory; less means another kind of GPU
_HEADINGS = ("node", "torch", "code", "GPUs", "cores", "memory", "free disk", "data", "slowest pair", "clock")

T = TypeVar("T")


def diagnose(
    reports: Sequence[NodeReport],
    expected: Sequence[str],
    *,
    several: bool,
    gpus: int | None,
    free_gib: float,
    silent: Mapping[str, str] | None = None,
) -> list[str]:
    """Return a line for each failure; none means go.

    Args:
        expected: names of the nodes that were examined.
        several: whether the run folder must be shared between nodes.
        gpus: GPUs that each node should have; 0: the most common number; None: the run uses none.
        free_gib: free space that the run folder's disk should have.
        silent: the reason for each node without a report, by name.
    """
    reports = sorted(reports, key=lambda report: report.index)  # without a majority, the first node is the reference
    found = [*_silent_nodes(reports, expected, silent or {}), *version_differences(reports)]
    found += model_differences(reports)
    for report in reports:
        found += [*_device_faults(report, reports, gpus), *folder_faults(report, shared=several, free_gib=free_gib)]
        found += _section_error(report, "data", "data")
    for report in reports:
        found += _network_faults(report)
    return [*found, *_pair_faults(reports)]


def _silent_nodes(reports: Sequence[NodeReport], expected: Sequence[str], reasons: Mapping[str, str]) -> Iterator[str]:
    answered = {report.node for report in reports}
    for node in expected:
        if node not in answered:
            reason = f": {reasons[node]}" if reasons.get(node) else ""
            yield (
                f"{node}: no answer{reason}; see sinfo -N -n {node} and systemctl status slurmd there, or leave it out: "
                f"--exclude={node}"
            )


def _section_error(report: NodeReport, section: str, name: str) -> list[str]:
    error = report.error(section)
    return [f"{report.node}: {name}: {error}"] if error else []


def version_differences(reports: Sequence[NodeReport]) -> list[str]:
    """Return a line for each package, and each copy of the project, that differs from most nodes'."""
    found = [line for report in reports for line in _section_error(report, "versions", "versions")]
    found += [line for report in reports for line in _section_error(report, "code", "its copy of the project")]
    versions = {report.node: report.versions for report in reports if report.versions is not None}
    for package in sorted({package for one in versions.values() for package in one}):
        installed = {node: one.get(package, "none") for node, one in versions.items()}
        usual = _most_common(list(installed.values()))
        found += [
            f"{node}: {package} {version}, but the others have {usual}; install that version there, or put the environment on "
            "shared storage"
            for node, version in installed.items()
            if version != usual
        ]
    digests = {report.node: report.code for report in reports if report.code is not None}
    if digests:
        usual = _most_common(list(digests.values()))
        found += [
            f"{node}: its copy of the project differs from the others' ({digest}, not {usual}); update the checkout there, or "
            "put it on shared storage"
            for node, digest in digests.items()
            if digest != usual
        ]
    return found


def model_differences(reports: Sequence[NodeReport]) -> list[str]:
    """Return a line for each node that lacks a module that the config names, or has another one than most nodes."""
    found = [f"{report.node}: {report.errors['model']}" for report in reports if "model" in report.errors]
    digests = {report.node: report.model for report in reports if report.model is not None}
    usual = _most_common(list(digests.values())) if digests else None
    return found + [
        f"{node}: the files of the modules that the config names differ from the others' ({digest}, not {usual}); copy "
        "them there, or put them on shared storage"
        for node, digest in digests.items()
        if digest != usual
    ]


def _most_common(values: Sequence[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _device_faults(report: NodeReport, reports: Sequence[NodeReport], gpus: int | None) -> list[str]:
    node, devices = report.node, report.devices
    if devices is None:
        return [f"{node}: devices: {report.error('devices')}; try python -c 'import torch; torch.cuda.init()' there"]
    if gpus is None:
        return []
    all_devices = [other.devices for other in reports if other.devices is not None]
    wanted = gpus or _most_common([other.gpus for other in all_devices])
    if devices.gpus != wanted:
        return [
            f"{node}: {devices.gpus} GPUs instead of {wanted}; request the same number on every node, --gpus-per-node=N; if "
            f"you did, see nvidia-smi there, or --exclude={node}"
        ]
    usual = _most_common([other.gpu_memory_gib for other in all_devices])
    if devices.gpu_memory_gib < _SMALLER_GPU * usual:
        return [
            f"{node}: GPUs of {devices.gpu_memory_gib} GiB, but the others have {usual} GiB; request one kind with --constraint"
        ]
    return []


def folder_faults(report: NodeReport, *, shared: bool, free_gib: float) -> list[str]:
    """Return a line if this node cannot use the run folder.

    Args:
        shared: whether it must see what another node wrote there.
        free_gib: free space that its disk should have.
    """
    node, folder = report.node, report.folder
    if folder is None:
        return [f"{node}: run folder: {report.error('folder')}"]
    setting = f"{node}: run_dir = {folder.path}"
    if shared and not folder.sees_token:
        return [
            f"{setting} is not shared: this node does not see a file that another one wrote; mount the shared storage, or give "
            "a --run_dir on it"
        ]
    if not folder.writable:
        return [f"{setting} is not writable there; fix its mount or permissions"]
    if folder.free_gib < free_gib:
        return [f"{setting} has {folder.free_gib} GiB free, less than {free_gib}; free disk space"]
    return []


def _network_faults(report: NodeReport) -> list[str]:
    node, network = report.node, report.network
    if error := report.errors.get("network"):
        return [f"{node}: network: {error}; see the firewall, the route (ip route get ADDRESS) and GLOO_SOCKET_IFNAME"]
    if network is None:  # the only node
        return []
    found = []
    if report.index not in network.present:
        found.append(
            f"{node}: reached the rendezvous too late; give --seconds 120 (in a job PREFLIGHT_SECONDS=120), or find out why "
            "the node is slow"
        )
    elif not network.sum_is_right:
        found.append(f"{node}: an all-reduce gave a wrong sum; check its network card and memory, or --exclude={node}")
    return found


def notes(reports: Sequence[NodeReport]) -> list[str]:
    """Return a line for each clock that is wrong and each pair of nodes that is slow: training works all the same."""
    clocks = [(report.node, report.network.clock_seconds) for report in reports if report.network]
    found = [
        f"{node}: its clock is {seconds:+.1f} s off the first node's; start chronyd or ntpd there"
        for node, seconds in clocks
        if seconds is not None and abs(seconds) > _CLOCK_SECONDS
    ]
    speeds = _pair_speeds(reports)
    usual = statistics.median(speeds.values()) if speeds else 0.0
    return found + [
        f"{first} and {second}: {speed:.2f} GiB/s, but the median pair has {usual:.2f}; check link speed (ethtool)"
        for (first, second), speed in speeds.items()
        if 0 <= speed < _SLOW * usual
    ]


def _pair_faults(reports: Sequence[NodeReport]) -> list[str]:
    """Return a line for each pair of nodes that corrupts data."""
    return [
        f"{first} and {second}: wrong bytes arrived; check cables and cards, or leave one of them out"
        for (first, second), speed in _pair_speeds(reports).items()
        if speed < 0
    ]


def _pair_speeds(reports: Sequence[NodeReport]) -> dict[tuple[str, str], float]:
    """Return the GiB/s of each pair of nodes, the lower of their two measurements; negative if a byte was wrong."""
    names = {report.index: report.node for report in reports}
    speeds: dict[tuple[str, str], float] = {}
    for report in reports:
        for other, speed in (report.network.gib_per_second if report.network else {}).items():
            if speed and other in names:
                first, second = sorted((report.node, names[other]))
                speeds[first, second] = min(speed, speeds.get((first, second), speed))
    return speeds


def table(reports: Sequence[NodeReport]) -> str:
    """Return a table with one row per node."""
    rows = [_HEADINGS, *(_row(report) for report in sorted(reports, key=lambda report: report.index))]
    return "\n".join(in_columns(rows))


def _row(report: NodeReport) -> tuple[str, ...]:
    devices, folder, network = report.devices, report.folder, report.network
    speeds = [speed for speed in network.gib_per_second.values() if speed] if network else []
    gpus = "?"
    if devices:
        gpus = f"{devices.gpus} x {devices.gpu_memory_gib} GiB" if devices.gpus else "0"
    return (
        report.node,
        (report.versions or {}).get("torch", "none"),
        "bad" if report.code is None else report.code[:12],
        gpus,
        f"{devices.cores if devices else '?'}",
        f"{devices.memory_gib if devices else '?'} GiB",
        f"{folder.free_gib if folder else '?'} GiB",
        report.data or "bad",
        f"{min(speeds):.2f} GiB/s" if speeds else "-",
        f"{network.clock_seconds * 1000:+.0f} ms" if network and network.clock_seconds is not None else "-",
    )
