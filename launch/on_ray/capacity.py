"""How many workers fit on a Ray cluster, and waiting until enough of them do."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from loguru import logger
from ray.autoscaler.sdk import request_resources

from distributed.config.scaling import Scaling
from distributed.errors import InputError
from launch.on_ray import compat
from launch.on_ray.compat import ClusterNode

_SETTLE_SECONDS = 5.0  # until the resources of a lost attempt are free again
_POLL_SECONDS = 0.5
REQUEST_SECONDS = 10.0
"""Time after which a request for nodes is renewed: Ray Train sends requests of its own, and the last one counts."""


class CapacityError(InputError):
    """The cluster did not have enough resources within `scaling.wait_seconds`."""


@dataclass(frozen=True)
class Capacity:
    """How many workers fit on the cluster."""

    now: int
    when_idle: int
    """The same if nothing else ran."""
    runs_when_idle: int
    """How many runs of `num_workers` fit at once if nothing else ran."""
    description: str
    """Each node's resources, for a message."""


def usable_nodes(excluded: Collection[str] = ()) -> list[ClusterNode]:
    """Return the nodes that are alive and not draining, except those whose ids are `excluded`."""
    unusable = {*compat.draining_nodes(), *excluded}
    return [node for node in compat.cluster_nodes() if node.alive and node.id not in unusable]


def capacity(scaling: Scaling, excluded: Collection[str] = ()) -> Capacity:
    """Return how many workers fit on the usable nodes."""
    free, nodes = compat.free_resources(), usable_nodes(excluded)
    hidden = [(len(compat.draining_nodes()), "draining"), (len(excluded), "excluded")]
    described = [_describe(node, free.get(node.id, {})) for node in nodes]
    described += [f"{count} more {state}" for count, state in hidden if count]
    when_idle = [workers_on_node(scaling, node.resources) for node in nodes]
    return Capacity(
        now=workers_on_cluster(scaling, [workers_on_node(scaling, free.get(node.id, {})) for node in nodes]),
        when_idle=workers_on_cluster(scaling, when_idle),
        runs_when_idle=runs_on_cluster(scaling, when_idle),
        description="; ".join(described) or "no node",
    )


def _describe(node: ClusterNode, free: dict[str, float]) -> str:
    resources = [
        f"{free.get(name, 0):g} of {node.resources[name]:g} {name}s free"
        for name in ("CPU", "GPU")
        if node.resources.get(name)
    ]
    return f"{node.hostname} ({node.address}): {', '.join(resources) or 'no CPUs'}"


def workers_on_node(scaling: Scaling, resources: dict[str, float]) -> int:
    """Return how many workers fit into a node's resources."""
    count = int(resources.get("CPU", 0) // scaling.cpus_per_worker)
    return min(count, int(resources.get("GPU", 0) // scaling.gpus_per_worker)) if scaling.gpus_per_worker else count


def workers_on_cluster(scaling: Scaling, per_node: Sequence[int]) -> int:
    """Return how many workers fit on the nodes together, as `scaling.placement` allows."""
    if scaling.placement == "strict_pack":
        return max(per_node, default=0)
    return sum(min(1, count) for count in per_node) if scaling.placement == "strict_spread" else sum(per_node)


def runs_on_cluster(scaling: Scaling, per_node: Sequence[int]) -> int:
    """Return how many runs of `num_workers` fit on the nodes at the same time, as `scaling.placement` allows."""
    size, most = scaling.num_workers, sum(per_node) // scaling.num_workers
    if scaling.placement == "strict_pack":
        return sum(count // size for count in per_node)
    if scaling.placement == "strict_spread":  # a node takes one worker of each run
        fits = (sum(min(runs, count) for count in per_node) >= runs * size for runs in range(1, most + 1))
        return sum(fits)
    return most


def wait_for_capacity(
    scaling: Scaling,
    stop_requested: Callable[[], str | None],
    excluded: Collection[str],
    *,
    busy_is_enough: bool = False,
) -> int:
    """Return how many workers to start; 0 if a stop was requested meanwhile.

    That is `num_workers` as soon as they fit, or fewer once no more capacity is expected.

    Args:
        busy_is_enough: wait without a limit as long as they would fit if nothing else ran.

    Raises:
        CapacityError: fewer than `min_workers` fit after `wait_seconds`.
    """
    start, requested_at = time.monotonic(), -math.inf
    fewest, most = scaling.least_workers, scaling.num_workers
    try:
        while not stop_requested():
            found, waited = capacity(scaling, excluded), time.monotonic() - start
            settled = waited > _SETTLE_SECONDS or found.now >= min(found.when_idle, most)
            if found.now >= most or (found.now >= fewest and settled):
                return min(found.now, most)
            # In a sweep, other trials have the workers: they will release them.
            if waited > scaling.wait_seconds and not (busy_is_enough and found.when_idle >= fewest):
                raise CapacityError(
                    f"{_shortage(scaling, found)}; lower scaling.num_workers, set scaling.min_workers, add nodes, or raise "
                    "scaling.wait_seconds"
                )
            if (
                waited > min(_SETTLE_SECONDS, scaling.wait_seconds)
                and time.monotonic() > requested_at + REQUEST_SECONDS
            ):
                if requested_at < start:
                    logger.warning("{}; waiting up to {:g} s for more", _shortage(scaling, found), scaling.wait_seconds)
                requested_at = time.monotonic()
                request_nodes(scaling, most)
            time.sleep(_POLL_SECONDS)
    finally:
        if requested_at > start:  # the autoscaler would keep nodes for the request after this program has ended
            request_nodes(scaling, 0)
    return 0


def _shortage(scaling: Scaling, found: Capacity) -> str:
    size = f"{scaling.cpus_per_worker} CPU" + (", 1 GPU" if scaling.gpus_per_worker else "")
    minimum = f" (scaling.min_workers = {scaling.min_workers})" if scaling.min_workers else ""
    workers = f"{found.now} worker{'s' if found.now != 1 else ''}"
    return (
        f"scaling.num_workers = {scaling.num_workers}{minimum}: the cluster has capacity for {workers} of {size} each "
        f"({scaling.placement}), {found.when_idle} when idle: {found.description}"
    )


def request_nodes(scaling: Scaling, workers: int) -> None:
    """Request nodes for this number of workers from the autoscaler. A no-op on a cluster without one."""
    worker = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.gpus_per_worker else {})
    request_resources(bundles=[worker] * workers)
