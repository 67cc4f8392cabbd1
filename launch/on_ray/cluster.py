"""What a Ray cluster has room for, and whether each of its nodes can take part in a run."""

import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray._private.state
from loguru import logger
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed.config import TrainConfig
from distributed.config.sections import Scaling
from distributed.errors import InputError
from distributed.topology import host
from launch.address import is_loopback
from launch.doctor import diagnosis
from launch.on_ray.node_check import about, look_around
from launch.on_ray.worker import draining_nodes

_state: Any = ray._private.state.state  # per node; what is public tells only the sum over all nodes
_SETTLE_SECONDS = 5.0  # in which what a lost attempt held comes free
_ANSWER_SECONDS = 120.0
_LOST_SECONDS = 30.0  # after which a node that was lost is known to be


class NoRoom(InputError):
    """The cluster did not have what was asked for in the time that the config gives it."""


@dataclass
class Nodes:
    """What a driver knows of the cluster's nodes, by their ids."""

    proved: set[str] = field(default_factory=set)
    """Those that were asked and can take part, or need not be asked: workers go to no other."""
    left_out: set[str] = field(default_factory=set)
    """Those that came in mid-run and cannot; one that is started again has another id."""


@dataclass(frozen=True)
class Room:
    """How many workers fit."""

    now: int
    if_empty: int
    """Were nothing else running."""
    words: str
    """What is there, for a message."""


def room(scaling: Scaling, left_out: Collection[str] = ()) -> Room:
    """Over all nodes that are alive, not about to go and not among those `left_out`, by their ids."""
    free, drained = _state.available_resources_per_node(), draining_nodes()
    nodes = _nodes(left_out)
    now = [_fitting(scaling, free.get(node["NodeID"], {})) for node in nodes]
    if_empty = [_fitting(scaling, node["Resources"]) for node in nodes]
    words = []
    for node in nodes:
        there, left = node["Resources"], free.get(node["NodeID"], {})
        parts = [
            f"{left.get(name, 0):g} of {there[name]:g} {name}s free" for name in ("CPU", "GPU") if there.get(name, 0)
        ]
        words.append(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {', '.join(parts) or 'no CPUs'}")
    more = [(len(drained), "about to go"), (len(left_out), "left out")]
    words += [f"{count} more {what}" for count, what in more if count]
    return Room(_together(scaling, now), _together(scaling, if_empty), "; ".join(words))


def _nodes(left_out: Collection[str]) -> list[dict[str, Any]]:
    """Those that new work may go to."""
    drained, known = draining_nodes(), _state.node_table()
    return [node for node in known if node["Alive"] and node["NodeID"] not in {*drained, *left_out}]


def _fitting(scaling: Scaling, resources: dict[str, float]) -> int:
    count = int(resources.get("CPU", 0) // scaling.cpus_per_worker)
    return min(count, int(resources.get("GPU", 0) // scaling.gpus_per_worker)) if scaling.gpus_per_worker else count


def _together(scaling: Scaling, each: list[int]) -> int:
    if scaling.placement == "strict_pack":
        return max(each, default=0)
    return sum(min(1, one) for one in each) if scaling.placement == "strict_spread" else sum(each)


def warn_if_open() -> None:
    """Warn if the cluster listens on a network and asks for no token."""
    if warning := open_to_all([node["NodeManagerAddress"] for node in _nodes(())], token=is_token_auth_enabled()):
        logger.warning("{}", warning)


def open_to_all(addresses: Sequence[str], *, token: bool) -> str:
    """The warning about a cluster whose nodes have these addresses; "" if it needs none."""
    outside = [] if token else [address for address in addresses if not is_loopback(address)]
    if not outside:
        return ""
    return (
        f"the Ray cluster on {outside[0]} asks for no token: whoever reaches it over the network can run any program there; "
        "run `ray get-auth-token --generate` before `ray start --head`, see docs/ray.md"
    )


def wait_for_room(scaling: Scaling, stopped: Callable[[], str | None], left_out: Collection[str]) -> int:
    """How many workers to start: all that are wanted as soon as they fit, or as many as there is room for, once it is
    clear that there will not be more. 0 where a stop was asked for meanwhile.

    Raises:
        NoRoom: not even the fewest fit, with what is there and what is asked.
    """
    begin, told = time.monotonic(), False
    least, most = scaling.least_workers, scaling.num_workers
    each = f"{scaling.cpus_per_worker} CPU" + (", 1 GPU" if scaling.gpus_per_worker else "")
    while not stopped():
        found, waited = room(scaling, left_out), time.monotonic() - begin
        if found.now >= most:
            break
        if found.now >= least and (waited > _SETTLE_SECONDS or found.now >= min(found.if_empty, most)):
            break
        of = "" if least == most else f" to {most}"
        why = (
            f"{least}{of} workers of {each} each are asked for ({scaling.placement}), and the cluster has room for "
            f"{found.now} now, {found.if_empty} when nothing else runs: {found.words or 'no node'}"
        )
        if waited > scaling.wait_seconds:
            _ask_autoscaler(scaling, 0)
            raise NoRoom(
                f"{why}; lower scaling.num_workers, set scaling.min_workers, add nodes, or raise scaling.wait_seconds"
            )
        if not told and waited > min(_SETTLE_SECONDS, scaling.wait_seconds):
            logger.warning("{}; waiting up to {:g} s for it", why, scaling.wait_seconds)
            _ask_autoscaler(scaling, most)
            told = True
        time.sleep(0.5)
    else:
        return 0
    if told:
        _ask_autoscaler(scaling, 0)
    return min(found.now, most)


def _ask_autoscaler(scaling: Scaling, workers: int) -> None:
    """Nobody listens where nodes do not come by themselves."""
    bundle = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.gpus_per_worker else {})
    request_resources(bundles=[bundle] * workers)


def check_nodes(config: TrainConfig, scaling: Scaling, known: Nodes, *, begun: bool) -> bool:
    """Ask each node that may be given workers, and was not asked before, whether it sees the run folder and the data, and
    runs the same code. Where workers can only come to this machine, there is nothing to ask.

    Args:
        known: what the nodes say is added.
        begun: whether the run has had an attempt: a node that came since and cannot take part is then left out.

    Returns:
        Whether there is the room there was: some node is left, and none of those asked was lost meanwhile, or left out.

    Raises:
        InputError: a line for each failure, with the node and the remedy.
    """
    nodes = {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
        for node in _nodes(known.proved | known.left_out)
        if _fitting(scaling, node["Resources"])
    }
    if nodes.keys() <= {ray.get_runtime_context().get_node_id()}:
        known.proved |= nodes.keys()
        return bool(known.proved)
    token = f".node-{uuid.uuid4().hex[:12]}"
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / token).write_text("", encoding="utf-8")
    except OSError as error:
        raise InputError(f"run_dir = {config.run_dir}: {error.strerror}; give another with --run_dir") from None
    try:
        failures = _ask_nodes(nodes, config, token)
    finally:
        for file in config.run_dir.glob(f"{token}*"):
            file.unlink(missing_ok=True)
    bad = {node for node, lines in failures.items() if lines}
    if bad and not begun:
        raise InputError(*(line for lines in failures.values() for line in lines))
    for node in bad:
        logger.warning("left out, unless it joins the cluster anew: {}", "; ".join(failures[node]))
    known.left_out |= bad
    known.proved |= failures.keys() - bad
    return not bad and failures.keys() == nodes.keys()


def _ask_nodes(nodes: dict[str, str], config: TrainConfig, token: str) -> dict[str, list[str]]:
    """A line for each thing that is wrong on a node, by id; without those that were lost meanwhile.

    Args:
        nodes: their names by id.
    """
    asked = {
        node: look_around.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            name, config.model_dump_json(), token
        )
        for node, name in nodes.items()
    }
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    own, failures = about(host(), config, "", index=-1), dict[str, list[str]]()
    for node, answer in asked.items():
        try:
            if answer not in answered:
                raise TimeoutError(f"no answer in {_ANSWER_SECONDS:g} s")
            failures[node] = _faults(own, ray.get(answer), config, token)
        except Exception as error:
            if isinstance(error, RayError) and not isinstance(error, RayTaskError) and _is_lost(node):
                logger.warning("node {} was lost while it was asked", nodes[node])
            else:
                last = str(error).strip().splitlines()[-1]
                failures[node] = [f"{nodes[node]}: {last}; see ray status"]
    return failures


def _faults(own: diagnosis.Report, report: diagnosis.Report, config: TrainConfig, token: str) -> list[str]:
    node = report["node"]
    found = diagnosis.folder_faults(report, token=True, free_gib=0)
    if not found and not (config.run_dir / f"{token}.{node}").exists():
        found = [f"{node}: run_dir = {config.run_dir}: what it writes there does not come to this node; "
                 "mount the same storage on both"]  # fmt: skip
    if trouble := diagnosis.error_of(report["data"]):
        found.append(f"{node}: data: {trouble}")
    return found + diagnosis.unlike_versions([own, report])  # own first: of two that differ, it is the measure


def _is_lost(node: str) -> bool:
    end = time.monotonic() + _LOST_SECONDS
    while any(known["NodeID"] == node and known["Alive"] for known in _state.node_table()):
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True
