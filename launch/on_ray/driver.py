"""The driver of a run on a Ray cluster: attempt after attempt, each a `TorchTrainer`, until the run is finished or cannot be.

What Ray Train would do by itself is done here, where nothing is lost by it: it would grow an elastic run by killing its
workers, and try bad input again. Here workers are asked to save and return first, and only what may go better is repeated.
"""

import logging
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from loguru import logger
from ray.train.torch import TorchConfig, TorchTrainer

from distributed.config import TrainConfig
from distributed.config.sections import Scaling
from distributed.errors import ExitCode, InputError, NotFiniteError, StorageError
from distributed.process import logs
from distributed.process.signals import SignalStop
from distributed.run.folder import RunFolder
from distributed.run.records import read_attempts
from distributed.training.stop import StopSource
from launch.on_ray.cluster import Nodes, NoRoom, check_nodes, room, wait_for_room, warn_if_open
from launch.on_ray.settings import Training
from launch.on_ray.worker import ask_to_stop, forget, train_on_worker

_GROWTH = "the driver, to go on with more workers"
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    code: ExitCode | None
    """With which the run is over; None: another attempt."""
    counts: bool = False
    """Whether it is a failure, of which there may be only so many."""


def run(training: Training) -> ExitCode:
    """Train on the cluster, through lost workers and nodes; the exit code says how it ended."""
    try:
        with connected(training.config.logging.level), SignalStop(launched=False) as stop:
            return attempts(training.config, training.scaling, stop)
    except InputError as error:
        for line in error.lines:
            logger.error("{}", line)
        return ExitCode.BAD_INPUT


@contextmanager
def connected(level: str) -> Iterator[None]:
    """This process as a driver: of the cluster that RAY_ADDRESS names or that runs here, else of one of its own."""
    logs.terminal_logs(0, level=level)
    ray.init(logging_level=logging.WARNING, log_to_driver=True)
    try:
        warn_if_open()
        yield
    finally:
        ray.shutdown()


def attempts(config: TrainConfig, scaling: Scaling, stop: StopSource, callbacks: Sequence[Any] = ()) -> ExitCode:
    """Attempt after attempt, of which `callbacks` hear what is reported.

    Raises:
        InputError: the cluster has no room for the first one, or a node cannot take part.
    """
    failures, begun, saved = 0, False, _saved_step(config)
    nodes = Nodes()
    while True:
        try:
            workers = wait_for_room(scaling, stop.requested, nodes.left_out)
        except NoRoom as error:
            if not begun:
                raise
            logger.error("{}", error)
            logger.error(
                "stopped at step {}, everything saved; the same command goes on from here", _saved_step(config)
            )
            return ExitCode.STOPPED
        if not workers:
            logger.warning("stopped by {} between two attempts; the same command goes on", stop.requested())
            return ExitCode.STOPPED
        if not check_nodes(config, scaling, nodes, begun=begun):
            continue
        begun = True
        ending = attempt(config, scaling, workers, nodes, stop, callbacks)
        if ending.code is not None:
            return ending.code
        before, saved = saved, _saved_step(config)
        failures = 0 if saved > before else failures + ending.counts
        if failures > scaling.max_failures:
            logger.error(
                "given up after {} failure{} in a row without a new checkpoint (scaling.max_failures = {})",
                failures, "s" if failures > 1 else "", scaling.max_failures,
            )  # fmt: skip
            return ExitCode.FAILED


def attempt(
    config: TrainConfig,
    scaling: Scaling,
    workers: int,
    nodes: Nodes,
    stop: StopSource,
    callbacks: Sequence[Any],
) -> Ending:
    """One attempt on that many workers, on nodes that were proved."""
    key = uuid.uuid4().hex
    logger.info("starting {} worker{}", workers, "s" if workers > 1 else "")
    growth = Growth(config, scaling, workers, nodes.left_out)
    with ThreadPoolExecutor(1) as thread:  # not the main thread, where Ray would take Ctrl-C for itself and abort
        result = thread.submit(trainer(config, scaling, workers, nodes, key, callbacks).fit)
        asked: str | None = None
        while not wait([result], timeout=_POLL_SECONDS).done:
            if not asked and (asked := stop.requested() or growth.wanted()):
                ask_to_stop(key, asked)
    forget(key)
    return _ending(config, result, stopped=bool(asked) and asked != _GROWTH)


class Growth:
    """Looks now and then whether a run on fewer workers than it wants could have more."""

    def __init__(self, config: TrainConfig, scaling: Scaling, workers: int, left_out: Collection[str]) -> None:
        self._run, self._scaling, self._left_out = RunFolder(config.run_dir), scaling, left_out
        self._possible = workers < scaling.num_workers
        self._begun = self._attempts()
        self._looked, self._seen = time.monotonic(), False

    def wanted(self) -> str | None:
        """The reason to stop for, once there was room at two looks: a node that died counts as free for a while, as does
        what the workers will hold before they began."""
        if not self._possible or time.monotonic() - self._looked < self._scaling.resize_seconds:
            return None
        self._looked, before = time.monotonic(), self._seen
        self._seen = self._attempts() > self._begun and room(self._scaling, self._left_out).now > 0
        return _GROWTH if before and self._seen else None

    def _attempts(self) -> int:
        return sum(line.event == "started" for line in read_attempts(self._run.attempts_file))


def trainer(
    config: TrainConfig,
    scaling: Scaling,
    workers: int,
    nodes: Nodes,
    stop_key: str,
    callbacks: Sequence[Any],
) -> TorchTrainer:
    """A Ray Train V2 trainer whose workers run the recipe. What Ray writes down of it lies in RUN/ray."""
    v2: Any = ray.train  # its types are those of the first version
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.gpus_per_worker else {})
    worker: Any = train_on_worker
    return TorchTrainer(
        worker,
        train_loop_config={"config": config.model_dump_json(), "stop_key": stop_key},
        # Ray makes the process group; flags and counters are host numbers, so that gloo is there beside NCCL.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if scaling.gpus_per_worker else "gloo",
            timeout_s=max(1, int(config.timeout_seconds)),
        ),
        scaling_config=v2.ScalingConfig(
            num_workers=workers,
            use_gpu=bool(scaling.gpus_per_worker),
            resources_per_worker=resources,
            placement_strategy=scaling.placement.upper(),
            # No space after the comma: Ray 2.60 allows one, and then takes it for a part of the id.
            label_selector={"ray.io/node-id": f"in({','.join(sorted(nodes.proved))})"},
        ),
        run_config=v2.RunConfig(
            name="ray",
            storage_path=str(config.run_dir),
            failure_config=v2.FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=v2.LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )


def _ending(config: TrainConfig, result: "Future[Any]", *, stopped: bool) -> Ending:
    """Args: stopped: whether the driver was asked to stop."""
    error = result.exception()
    if error is None:
        return _ending_by_return(config, result.result().return_value, stopped=stopped)
    causes = _causes(error)
    for cause in causes.values():
        if isinstance(cause, InputError | NotFiniteError | StorageError):
            for line in str(cause).splitlines():
                logger.error("{}", line)
            return Ending(ExitCode(cause.exit_code))
    for rank, cause in causes.items() or [(None, error)]:
        lines = [line for line in str(cause).splitlines() if line.strip()]
        logger.error(
            "{}: {}: {}", "Ray" if rank is None else f"rank {rank}", type(cause).__name__, lines[0] if lines else ""
        )
    logger.opt(exception=error).debug("what Ray said")
    logger.warning("the attempt failed; the last checkpoint is of step {}", _saved_step(config))
    return Ending(ExitCode.STOPPED if stopped else None, counts=True)


def _ending_by_return(config: TrainConfig, stand: dict[str, Any], *, stopped: bool) -> Ending:
    reason = stand["stopped_by"]
    if not reason:
        logger.info(
            "finished after {} epochs, {} steps; all of it in {}", stand["epoch"], stand["step"], config.run_dir
        )
        return Ending(ExitCode.FINISHED)
    logger.info("stopped by {} at step {}, everything saved", reason, stand["step"])
    if not stopped:
        return Ending(None)
    logger.warning("the same command goes on from here")
    return Ending(ExitCode.STOPPED)


def _causes(error: BaseException) -> dict[int, BaseException]:
    """What each rank failed with, those whose peers were lost last: they say least."""
    causes = dict(getattr(error, "worker_failures", {}))
    return dict(sorted(causes.items(), key=lambda one: isinstance(one[1], RuntimeError)))


def _saved_step(config: TrainConfig) -> int:
    """Of the newest checkpoint; -1 where there is none."""
    state = (RunFolder(config.run_dir).newest_state() or {}).get("state")
    step = state.get("step", 0) if isinstance(state, dict) else -1
    return step if isinstance(step, int) else -1
