"""Runs the recipe on a Ray worker, with Ray as a source of stop requests and a sink of metrics."""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import ray
import ray.train
from loguru import logger
from ray.util.metrics import Gauge

from distributed.checkpoint.upload import log_upload_result
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.host.identity import host
from distributed.metrics.records import EpochMetrics, TrainMetrics
from distributed.process import logs
from distributed.process.optional_output import OptionalOutput
from distributed.recipe import train
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from launch.on_ray import compat

_POLL_SECONDS = 1.0


class WorkerResult(NamedTuple):
    """The state of the run when a worker returns."""

    stopped_by: str | None
    """Why the run was stopped; None if it is finished."""
    step: int
    epoch: int


def request_stop(key: str, reason: str) -> None:
    """Make all workers that watch this key save at their next step and return."""
    compat.put_value(key, reason)


def clear_stop(key: str) -> None:
    """Remove the request, once no worker watches the key any more."""
    compat.delete_value(key)


class ClusterStop:
    """A `StopSource` that watches a key and draining nodes. Context manager.

    A thread polls the cluster, because each poll is a call over the network, while the training loop queries this after
    every step. Ray's own `get_preemption_info` would be a barrier of all workers.

    Args:
        nodes: names of the nodes to watch, by their ids.
    """

    def __init__(self, key: str, nodes: Mapping[str, str]) -> None:
        self._key, self._nodes = key, nodes
        self._reason: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)

    def requested(self) -> str | None:
        return self._reason

    def _watch(self) -> None:
        while self._reason is None and not self._done.wait(_POLL_SECONDS):
            try:
                self._reason = compat.get_value(self._key)
                draining = compat.draining_nodes() & self._nodes.keys()
            except (
                Exception
            ) as error:  # the head may be unreachable for a moment; Ray kills workers that it gives up on
                logger.debug("no answer from the cluster: {}", error)
                continue
            if draining and self._reason is None:
                self._reason = f"the drain of node {self._nodes[draining.pop()]}"

    def __enter__(self) -> Self:
        with suppress(Exception):  # as in `_watch`; a training of a sweep that is being stopped must not even start
            self._reason = compat.get_value(self._key)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._done.set()
        self._thread.join()


class RayReport:
    """A `Sink` on every rank: rank 0's training metrics become gauges of Ray's, epochs are reported to Ray Train.

    Ray keeps metrics only together with a checkpoint. The run's checkpoints stay in the run folder; Ray's is a note with
    its path.
    """

    on_every_rank = True

    def __init__(self, run_dir: Path, *, is_main: bool) -> None:
        self._run_dir, self._is_main = run_dir, is_main
        self._gauges: dict[str, Gauge] = {}

    def log_step(self, metrics: TrainMetrics) -> None:
        if not self._is_main:
            return
        for name in ("step", "epoch", "loss", "accuracy", "lr", "images_per_second"):
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"training_{name}", tag_keys=("run",))
                self._gauges[name].set_default_tags({"run": RunFolder(self._run_dir).name})
            self._gauges[name].set(getattr(metrics, name))

    def log_epoch(self, metrics: EpochMetrics) -> None:
        report: dict[str, Any] = {name: value for name, value in asdict(metrics).items() if not isinstance(value, dict)}
        for split in ("validation", "test"):
            if values := getattr(metrics, split):
                report |= {f"{split}_{name}": value for name, value in asdict(values).items()}
            report.pop(split, None)
        report["world_size"] = ray.train.get_context().get_world_size()
        note = {"run_dir": str(self._run_dir), "step": metrics.step, "epoch": metrics.epoch}
        checkpoint = None
        with ExitStack() as stack:
            if self._is_main:
                with OptionalOutput("Ray's note of the epoch"):  # if it fails, this rank must still reach the barrier
                    folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                    Path(folder, "where.json").write_text(json.dumps(note), encoding="utf-8")
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(report, checkpoint=checkpoint)  # a barrier of all workers

    def close(self) -> None:
        pass


def train_on_worker(arguments: dict[str, str]) -> WorkerResult:
    """Train, and return the state of the run; the driver reads rank 0's result.

    Args:
        arguments: `config`, a `TrainConfig` as JSON, and `stop_key`, the key to watch for stop requests.
    """
    config = TrainConfig.model_validate_json(arguments["config"])
    topology = Topology.from_environment()
    logs.terminal_logs(topology.rank, level=config.logging.level)
    print(
        f"rank {topology.rank} of {topology.world_size}: process {os.getpid()} on {host()}", file=sys.stderr, flush=True
    )
    # All workers' nodes, so that rank 0 can name the one that is draining.
    nodes = dict(collectives.gather_objects((ray.get_runtime_context().get_node_id(), host())))
    with ClusterStop(arguments["stop_key"], nodes) as stop:
        result = train(config, stop=stop, sinks=[RayReport(config.run_dir, is_main=topology.is_main)])
    if topology.is_main:
        log_upload_result(config)
    return WorkerResult(result.stop_reason, result.step, result.epoch)
