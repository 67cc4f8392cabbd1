"""Checks whether the nodes of a Ray cluster can take part in a run."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import ray
from loguru import logger
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed.config import TrainConfig
from distributed.config.scaling import Scaling
from distributed.errors import InputError
from distributed.host.identity import host
from distributed.run.records import Holder
from launch.address import is_loopback
from launch.doctor.diagnosis import folder_faults, model_differences, version_differences
from launch.doctor.reports import NodeReport
from launch.doctor.token import token_in
from launch.on_ray import compat
from launch.on_ray.capacity import usable_nodes, workers_on_node
from launch.on_ray.node_check import node_report, remote_report

_REPORT_SECONDS = 120.0
_LOSS_SECONDS = 30.0  # after which the cluster knows that a node is lost


@dataclass
class CheckedNodes:
    """The ids of the nodes that the driver has checked; a node that rejoins has a new id."""

    usable: set[str] = field(default_factory=set)
    """Nodes that can take part; workers run only there."""
    excluded: set[str] = field(default_factory=set)
    """Nodes that joined during the run and cannot take part."""


def warn_if_open() -> None:
    """Warn if the cluster listens on a network and requires no token."""
    if warning := open_cluster_warning([node.address for node in usable_nodes()], token=compat.requires_token()):
        logger.warning("{}", warning)


def open_cluster_warning(addresses: Sequence[str], *, token: bool) -> str:
    """Return the warning about a cluster whose nodes have these addresses; empty if there is nothing to warn about."""
    exposed = [] if token else [address for address in addresses if not is_loopback(address)]
    if not exposed:
        return ""
    return (
        f"the Ray cluster on {exposed[0]} requires no token: anyone who reaches it over the network can run programs there; "
        "run `ray get-auth-token --generate` before `ray start --head`, see docs/ray.md"
    )


def check_nodes(config: TrainConfig, scaling: Scaling, checked: CheckedNodes, *, started: bool) -> bool:
    """Check each new node that may get workers: whether it shares the run folder, has the data and runs the same code.

    If workers can only go to this machine, no check is needed.

    Args:
        checked: updated with the results.
        started: whether the run has had an attempt; if so, a node that cannot take part is excluded without an error,
            unless no other can.

    Returns:
        Whether the capacity is unchanged: there is a usable node, and none was lost or excluded meanwhile.

    Raises:
        InputError: a line for each failure, with the node and the remedy.
    """
    nodes = {
        node.id: f"{node.hostname} ({node.id[:8]})"
        for node in usable_nodes(checked.usable | checked.excluded)
        if workers_on_node(scaling, node.resources)
    }
    if nodes.keys() <= {ray.get_runtime_context().get_node_id()}:
        checked.usable |= nodes.keys()
        return bool(checked.usable)
    with token_in(config.run_dir, ".node") as token:
        failures = _failures(nodes, config, token)
    bad = {node for node, lines in failures.items() if lines}
    if bad and (not started or not checked.usable | (failures.keys() - bad)):
        raise InputError(*(line for lines in failures.values() for line in lines))
    for node in bad:
        logger.warning("excluded until Ray is restarted there: {}", "; ".join(failures[node]))
    checked.excluded |= bad
    checked.usable |= failures.keys() - bad
    return not bad and failures.keys() == nodes.keys()


def release_lock_of_lost_node(run_dir: Path) -> None:
    """Remove the run folder's lock if a lost node holds it: a file server may keep the lock of a dead host for good.

    A node that is only cut off from the cluster cannot write afterwards: its token is no longer that of the folder.
    """
    with suppress(RayError, RuntimeError, OSError):
        holder, nodes = Holder.read(run_dir / "attempt.json").host, compat.cluster_nodes()
        alive = {node.hostname for node in nodes if node.alive}
        if holder in {node.hostname for node in nodes} - alive:
            (run_dir / ".lock").unlink(missing_ok=True)


def _failures(nodes: dict[str, str], config: TrainConfig, token: str) -> dict[str, list[str]]:
    """Return a line for each failure of a node, by id; nodes that were lost meanwhile are missing.

    Args:
        nodes: names by id.
    """
    pending = {
        node: remote_report.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            name, config.model_dump_json(), token
        )
        for node, name in nodes.items()
    }
    ready, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=_REPORT_SECONDS)
    own, failures = node_report(host(), config, "", index=-1), dict[str, list[str]]()
    for node, reference in pending.items():
        try:
            if reference not in ready:
                raise TimeoutError(f"no answer in {_REPORT_SECONDS:g} s")
            failures[node] = _faults(own, ray.get(reference), config, token)
        except Exception as error:
            if isinstance(error, RayError) and not isinstance(error, RayTaskError) and _is_lost(node):
                logger.warning("node {} was lost during its check", nodes[node])
            else:
                last = str(error).strip().splitlines()[-1]
                lacks_module = last.startswith("ModuleNotFoundError")
                remedy = (
                    "submit with ray job submit --working-dir, or install it there"
                    if lacks_module
                    else "see ray status"
                )
                failures[node] = [f"{nodes[node]}: {last}; {remedy}"]
    return failures


def _faults(own: NodeReport, report: NodeReport, config: TrainConfig, token: str) -> list[str]:
    node = report.node
    found = folder_faults(report, shared=True, free_gib=0)
    if not found and not (config.run_dir / f"{token}.{node}").exists():
        found = [
            f"{node}: run_dir = {config.run_dir}: the driver's node does not see a file that {node} wrote; mount the same "
            "storage on both"
        ]
    if error := report.error("data"):
        found.append(f"{node}: data: {error}")
    # If they differ, the first is the reference.
    return found + version_differences([own, report]) + model_differences([own, report])


def _is_lost(node: str) -> bool:
    deadline = time.monotonic() + _LOSS_SECONDS
    while any(known.id == node and known.alive for known in compat.cluster_nodes()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
