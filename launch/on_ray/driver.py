"""The driver of a run on a Ray cluster: one `TorchTrainer` per attempt, until the run is finished or must not be retried.

Ray Train's own elasticity would kill the workers to grow a run, and its retries would repeat bad input. This driver
first requests that the workers save and return, and retries only if the next attempt can succeed.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray.train
from loguru import logger
from ray.train.torch import TorchConfig, TorchTrainer

from distributed.config import TrainConfig
from distributed.config.scaling import Scaling
from distributed.errors import ExitCode, InputError, NotFiniteError, StorageError
from distributed.process.signals import SignalStop
from distributed.run.checkpoint_layout import step_of
from distributed.run.folder import RunFolder
from distributed.training.stop import StopSource
from launch.on_ray.capacity import CapacityError, wait_for_capacity
from launch.on_ray.cluster import CheckedNodes, check_nodes, release_lock_of_lost_node
from launch.on_ray.connection import connected
from launch.on_ray.growth import GROWTH, GrowthMonitor
from launch.on_ray.settings import Training
from launch.on_ray.worker import WorkerResult, clear_stop, request_stop, train_on_worker

_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    code: ExitCode | None
    """The exit code of the run; None: try again."""
    failed: bool = False
    """Whether the attempt counts toward `scaling.max_failures`."""


def run(training: Training) -> ExitCode:
    """Train on the cluster, through lost workers and nodes, and return the exit code."""
    try:
        with connected(training.config.logging.level), SignalStop(launched=False) as stop:
            return run_attempts(training.config, training.scaling, stop)
    except InputError as error:
        for line in error.lines:
            logger.error("{}", line)
        return ExitCode.BAD_INPUT


def run_attempts(
    config: TrainConfig,
    scaling: Scaling,
    stop: StopSource,
    callbacks: Sequence[Any] = (),
    *,
    in_sweep: bool = False,
) -> ExitCode:
    """Run attempts until the run ends, and return its exit code.

    Args:
        callbacks: Ray Train's callbacks, which get the reported metrics.
        in_sweep: whether this is a trial of a sweep, which has checked capacity and nodes before its first trial. Other
            trials may have the workers.

    Raises:
        InputError: the first attempt does not fit on the cluster, or a node cannot take part.
    """
    failures, started, saved = 0, in_sweep, _saved_step(config)
    nodes = CheckedNodes()
    while True:
        try:
            workers = wait_for_capacity(scaling, stop.requested, nodes.excluded, busy_is_enough=in_sweep)
        except CapacityError as error:
            if not started:
                raise
            logger.error("{}", error)
            logger.error("stopped; {}; the same command resumes", _last_save(config))
            return ExitCode.STOPPED
        if not workers:
            logger.warning("stopped by {} between two attempts; the same command resumes", stop.requested())
            return ExitCode.STOPPED
        if not check_nodes(config, scaling, nodes, started=started):
            continue
        started = True
        outcome = run_attempt(config, scaling, workers, nodes, stop, callbacks)
        if outcome.code is not None:
            return outcome.code
        if outcome.failed:
            release_lock_of_lost_node(config.run_dir)
        before, saved = saved, _saved_step(config)
        failures = 0 if saved > before else failures + outcome.failed
        if failures > scaling.max_failures:
            logger.error(
                "gave up after {} failure{} in a row without a new checkpoint (scaling.max_failures = {})",
                failures, "s" if failures > 1 else "", scaling.max_failures,
            )  # fmt: skip
            return ExitCode.FAILED


def run_attempt(
    config: TrainConfig,
    scaling: Scaling,
    workers: int,
    nodes: CheckedNodes,
    stop: StopSource,
    callbacks: Sequence[Any],
) -> Outcome:
    """Run one attempt with `workers` workers on the usable nodes."""
    key = uuid.uuid4().hex
    logger.info("starting {} worker{}", workers, "s" if workers > 1 else "")
    with suppress(OSError):  # Ray's list of reported epochs: one that a kill cut off would fail every later attempt
        (config.run_dir / "ray" / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    growth = GrowthMonitor(config, scaling, workers, nodes.excluded)
    reason: str | None = None
    try:
        with ThreadPoolExecutor(1) as thread:  # in the main thread, Ray would handle Ctrl-C itself and abort
            result = thread.submit(make_trainer(config, scaling, workers, nodes, key, callbacks).fit)
            while not wait([result], timeout=_POLL_SECONDS).done:
                growth.request_nodes()
                if not reason and (reason := stop.requested() or growth.stop_reason()):
                    request_stop(key, reason)
    finally:
        growth.withdraw_request()
        clear_stop(key)
    return _outcome(config, result, stopped=bool(reason) and reason != GROWTH)


def make_trainer(
    config: TrainConfig,
    scaling: Scaling,
    workers: int,
    nodes: CheckedNodes,
    stop_key: str,
    callbacks: Sequence[Any],
) -> TorchTrainer:
    """Return a Ray Train V2 trainer whose workers run the recipe; Ray's own files are in RUN/ray."""
    v2: Any = ray.train  # its type annotations are those of the first version
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.gpus_per_worker else {})
    worker: Any = train_on_worker
    return TorchTrainer(
        worker,
        train_loop_config={"config": config.model_dump_json(), "stop_key": stop_key},
        # Ray creates the process group; gloo is needed in addition to NCCL, for flags and counters on the host.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if scaling.gpus_per_worker else "gloo",
            timeout_s=max(1, int(config.timeout_seconds)),
        ),
        scaling_config=v2.ScalingConfig(
            num_workers=workers,
            use_gpu=bool(scaling.gpus_per_worker),
            resources_per_worker=resources,
            placement_strategy=scaling.placement.upper(),
            # No space after the comma: Ray 2.60 accepts one, but then treats it as part of the id.
            label_selector={"ray.io/node-id": f"in({','.join(sorted(nodes.usable))})"},
        ),
        run_config=v2.RunConfig(
            name="ray",
            storage_path=str(config.run_dir),
            failure_config=v2.FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=v2.LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )


def _outcome(config: TrainConfig, result: "Future[Any]", *, stopped: bool) -> Outcome:
    """Log how an attempt ended, and return its outcome.

    Args:
        stopped: whether the driver itself got a stop request.
    """
    error = result.exception()
    if error is None:
        return _outcome_of_return(config, result.result().return_value, stopped=stopped)
    causes = _causes(error)
    for cause in causes.values():
        if isinstance(cause, InputError | NotFiniteError | StorageError):
            for line in str(cause).splitlines():
                logger.error("{}", line)
            return Outcome(ExitCode(cause.exit_code))
    for rank, cause in causes.items() or [(None, error)]:
        lines = [line for line in str(cause).splitlines() if line.strip()]
        source = "Ray" if rank is None else f"rank {rank}"
        logger.error("{}: {}: {}", source, type(cause).__name__, lines[0] if lines else "")
    logger.opt(exception=error).debug("Ray's error")
    logger.warning("the attempt failed; {}", _last_save(config))
    return Outcome(ExitCode.STOPPED if stopped else None, failed=True)


def _outcome_of_return(config: TrainConfig, result: WorkerResult, *, stopped: bool) -> Outcome:
    if not result.stopped_by:
        logger.info("finished at epoch {}, step {}; run folder {}", result.epoch, result.step, config.run_dir)
        return Outcome(ExitCode.FINISHED)
    logger.info("stopped by {} at step {}, everything saved", result.stopped_by, result.step)
    if not stopped:
        return Outcome(None)
    logger.warning("the same command resumes")
    return Outcome(ExitCode.STOPPED)


def _causes(error: BaseException) -> dict[int, BaseException]:
    """Return each rank's error, those about lost peers last, since they are the least informative."""
    causes = dict(getattr(error, "worker_failures", {}))
    return dict(sorted(causes.items(), key=lambda entry: isinstance(entry[1], RuntimeError)))


def _last_save(config: TrainConfig) -> str:
    step = _saved_step(config)
    return "nothing was saved yet" if step < 0 else f"the last checkpoint is of step {step}"


def _saved_step(config: TrainConfig) -> int:
    """Return the step of the newest checkpoint; -1 if there is none."""
    step = step_of(RunFolder(config.run_dir).newest_state())
    return -1 if step is None else step
