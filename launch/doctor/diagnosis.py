"""Nodes' reports side by side: the table, and a line for each thing that is wrong, with the node and the remedy."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Report = dict[str, Any]
_CLOCK_SECONDS = 1.0
_SLOW = 0.25  # of the median of all pairs


def wrong(
    reports: Sequence[Report],
    expected: Sequence[str],
    *,
    token: bool,
    gpus: int,
    free_gib: float,
    silent: Mapping[str, str] | None = None,
) -> list[str]:
    """A line for each failure; none: go.

    Args:
        expected: names of the nodes that were asked.
        token: whether a token was laid into the run folder.
        gpus: how many each node should have; 0: as many as the others.
        free_gib: that the run folder's disk should have.
        silent: why there is no report of a node, by its name.
    """
    reports = sorted(
        reports, key=lambda report: int(report["index"])
    )  # where two disagree, the first node is the measure
    answered = {report["node"] for report in reports}
    found = [
        f"{node}: no answer{f': {reason}' if reason else ''}; see sinfo -N -n {node} and systemctl status slurmd there, or "
        f"leave it out: --exclude={node}"
        for node in expected
        for reason in [(silent or {}).get(node, "")]
        if node not in answered
    ]
    found += unlike_versions(reports)
    for report in reports:
        found += _devices(report, reports, gpus) + folder_faults(report, token=token, free_gib=free_gib)
        if error := error_of(report["data"]):
            found.append(f"{report['node']}: data: {error}")
    return found + _network(reports)


def error_of(part: Any) -> str:
    return str(part.get("error", "")) if isinstance(part, dict) else ""


def unlike_versions(reports: Sequence[Report]) -> list[str]:
    """What differs from what most nodes have, or from the first where there is no majority."""
    found = [f"{report['node']}: versions: {error_of(report['versions'])}" for report in reports
             if error_of(report["versions"])]  # fmt: skip
    found += [f"{report['node']}: its files of the project: {error_of(report['code'])}" for report in reports
              if error_of(report["code"])]  # fmt: skip
    reports = [report for report in reports if not error_of(report["versions"]) and not error_of(report["code"])]
    if not reports:
        return found
    packages = {name for report in reports for name in report["versions"]}
    for name in sorted(packages):
        usual = _usual([report["versions"].get(name, "none") for report in reports])
        found += [
            f"{report['node']}: {name} {report['versions'].get(name, 'none')}, and the others have {usual}; install the same "
            "there, or put the environment on shared storage"
            for report in reports
            if report["versions"].get(name, "none") != usual
        ]
    usual = _usual([str(report["code"]) for report in reports])
    found += [
        f"{report['node']}: its files of the project differ from the others' ({report['code']}, not {usual}); update the "
        "checkout there, or put it on shared storage"
        for report in reports
        if str(report["code"]) != usual
    ]
    return found


def _usual(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _devices(report: Report, reports: Sequence[Report], gpus: int) -> list[str]:
    node, own = report["node"], report["devices"]
    if error := error_of(own):
        return [f"{node}: devices: {error}; try python -c 'import torch; torch.cuda.init()' there"]
    others = [other["devices"] for other in reports if not error_of(other["devices"])]
    wanted = gpus or _usual([other["gpus"] for other in others])
    if own["gpus"] != wanted:
        return [f"{node}: {own['gpus']} GPUs, and {wanted} are expected; see nvidia-smi there, or --exclude={node}"]
    usual = _usual([other["gpu_memory_gib"] for other in others])
    if own["gpu_memory_gib"] < 0.95 * usual:
        return [
            f"{node}: GPUs of {own['gpu_memory_gib']} GiB, and the others have {usual}; ask for one kind with --constraint"
        ]
    return []


def folder_faults(report: Report, *, token: bool, free_gib: float) -> list[str]:
    node, own = report["node"], report["folder"]
    if error := error_of(own):
        return [f"{node}: run folder: {error}"]
    if token and not own["sees_token"]:
        return [f"{node}: run_dir = {own['path']} is not shared: it does not see what another node wrote; mount the shared "
                "storage, or give a --run_dir on it"]  # fmt: skip
    if not own["writable"]:
        return [f"{node}: run_dir = {own['path']} cannot be written there; fix its mount or permissions"]
    if own["free_gib"] < free_gib:
        return [f"{node}: run_dir = {own['path']} has {own['free_gib']} GiB free, less than {free_gib}; make room"]
    return []


def _network(reports: Sequence[Report]) -> list[str]:
    names = {report["index"]: report["node"] for report in reports}
    found, speeds = [], dict[tuple[str, str], float]()
    for report in reports:
        node, own = report["node"], report.get("network", {})
        if error := error_of(own):
            found.append(
                f"{node}: network: {error}; see the firewall, the route (ip route get ADDRESS) and GLOO_SOCKET_IFNAME"
            )
        elif own and report["index"] not in own["met"]:
            found.append(f"{node}: it came too late to meet the others; give --seconds 60, or see what slows it")
        elif own and not own.get("sum_is_right", True):
            found.append(
                f"{node}: an all-reduce gave a wrong sum; check its network card and memory, or --exclude={node}"
            )
        if abs(own.get("clock_seconds", 0)) > _CLOCK_SECONDS:
            found.append(
                f"{node}: its clock is {own['clock_seconds']:+.1f} s off the first node's; start chronyd or ntpd there"
            )
        for other, speed in own.get("gib_per_second", {}).items():
            if speed and int(other) in names:
                one, two = sorted((node, names[int(other)]))
                speeds[one, two] = min(speed, speeds.get((one, two), speed))
    usual = statistics.median(speeds.values()) if speeds else 0.0
    for (one, two), speed in speeds.items():
        if speed < 0:
            found.append(f"{one} and {two}: wrong bytes came over; check cables and cards, or leave one of them out")
        elif speed < _SLOW * usual:
            found.append(
                f"{one} and {two}: {speed:.2f} GiB/s, and the median pair has {usual:.2f}; check link speed (ethtool)"
            )
    return found


def table(reports: Sequence[Report]) -> str:
    """A row a node."""
    rows = [("node", "torch", "code", "GPUs", "cores", "memory", "free disk", "data", "slowest pair", "clock")]
    for report in sorted(reports, key=lambda one: one["index"]):
        devices, folder, network = (
            part if isinstance(part := report.get(name, {}), dict) and not error_of(part) else {}
            for name in ("devices", "folder", "network")
        )
        speeds = [speed for speed in network.get("gib_per_second", {}).values() if speed]
        gpus = f"{devices.get('gpus', '?')}" + (f" x {devices['gpu_memory_gib']} GiB" if devices.get("gpus") else "")
        rows.append((
            report["node"], report["versions"].get("torch", "none"),
            "bad" if error_of(report["code"]) else str(report["code"])[:12], gpus,
            str(devices.get("cores", "?")), f"{devices.get('memory_gib', '?')} GiB", f"{folder.get('free_gib', '?')} GiB",
            "bad" if error_of(report["data"]) else str(report["data"]),
            f"{min(speeds):.2f} GiB/s" if speeds else "-",
            f"{network['clock_seconds'] * 1000:+.0f} ms" if "clock_seconds" in network else "-",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
