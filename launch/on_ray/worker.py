"""What each Ray worker runs: the recipe, with Ray as a source of requests to stop and a place where metrics are told."""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray._private.state
import ray.train
from loguru import logger
from ray.experimental import internal_kv
from ray.util.metrics import Gauge

from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.metrics.records import EpochMetrics, TrainMetrics
from distributed.process import logs
from distributed.process.optional_output import OptionalOutput
from distributed.recipe import train
from distributed.topology import Topology, host

_NAMESPACE = b"distributed"
_LOOK_SECONDS = 1.0


def ask_to_stop(key: str, reason: str) -> None:
    """Ask all workers that look at this key to save at their next step and return."""
    internal_kv._internal_kv_put(key, reason, namespace=_NAMESPACE)


def forget(key: str) -> None:
    """Take the request back, once nobody looks any more."""
    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def draining_nodes() -> set[str]:
    """Ids of nodes that are about to be taken away: no new work goes there."""
    return set(ray._private.state.state.get_draining_nodes())


class ClusterStop:
    """A request under a key, or the notice that a node is about to go. A context; also a `StopSource`.

    A thread looks, since each look is a call over the network and the loop asks after every step. Ray's own
    `get_preemption_info` would be a barrier of all workers.

    Args:
        nodes: names of the nodes that matter, by their ids.
    """

    def __init__(self, key: str, nodes: Mapping[str, str]) -> None:
        self._key, self._nodes = key, nodes
        self._reason: str | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stop", daemon=True)

    def requested(self) -> str | None:
        return self._reason

    def _look(self) -> None:
        while self._reason is None and not self._left.wait(_LOOK_SECONDS):
            try:
                asked = internal_kv._internal_kv_get(self._key, namespace=_NAMESPACE)
                drained = draining_nodes() & self._nodes.keys()
            except Exception as error:  # the head is away for a moment; a worker that it gives up is ended by Ray
                logger.debug("no answer from the cluster: {}", error)
                continue
            self._reason = (
                asked.decode() if asked else f"the drain of node {self._nodes[drained.pop()]}" if drained else None
            )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._left.set()
        self._thread.join()


class RayReport:
    """Logging steps become gauges of Ray's metrics, rank 0's; epochs are reported to Ray Train, so that its `Result` has
    them.

    Ray keeps metrics only of checkpoints. Ours stay in the run folder; Ray's is a note that says where.
    """

    def __init__(self, run_dir: Path, *, is_main: bool) -> None:
        self._run_dir, self._is_main = run_dir, is_main
        self._gauges: dict[str, Gauge] = {}

    def log_step(self, metrics: TrainMetrics) -> None:
        if not self._is_main:
            return
        for name in ("step", "epoch", "loss", "accuracy", "lr", "images_per_second"):
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"training_{name}", tag_keys=("run",))
                self._gauges[name].set_default_tags({"run": self._run_dir.name})
            self._gauges[name].set(getattr(metrics, name))

    def log_epoch(self, metrics: EpochMetrics) -> None:
        told: dict[str, Any] = {name: value for name, value in asdict(metrics).items() if not isinstance(value, dict)}
        for split in ("validation", "test"):
            if values := getattr(metrics, split):
                told |= {f"{split}_{name}": value for name, value in asdict(values).items()}
            told.pop(split, None)
        told["world_size"] = ray.train.get_context().get_world_size()
        note = {"run_dir": str(self._run_dir), "step": metrics.step, "epoch": metrics.epoch}
        checkpoint = None
        with ExitStack() as stack:
            if self._is_main:
                with OptionalOutput(
                    "Ray's note of the epoch"
                ):  # alone, this rank must come to the barrier all the same
                    folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                    Path(folder, "where.json").write_text(json.dumps(note), encoding="utf-8")
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(told, checkpoint=checkpoint)  # of all workers, a barrier

    def close(self) -> None:
        pass


def train_on_worker(given: dict[str, str]) -> dict[str, Any]:
    """Train; what is returned on rank 0 is where the run stands and, if it was stopped, why."""
    config = TrainConfig.model_validate_json(given["config"])
    topology = Topology.from_environment()
    logs.terminal_logs(topology.rank, level=config.logging.level)
    print(
        f"rank {topology.rank} of {topology.world_size}: process {os.getpid()} on {host()}", file=sys.stderr, flush=True
    )
    # Of all workers, so that rank 0 can say which it was.
    nodes = dict(collectives.gather_objects((ray.get_runtime_context().get_node_id(), host())))
    with ClusterStop(given["stop_key"], nodes) as stop:
        state = train(config, stop=stop, sinks=[RayReport(config.run_dir, is_main=topology.is_main)])
    return {"stopped_by": state.stop_reason, "step": state.step, "epoch": state.epoch}
