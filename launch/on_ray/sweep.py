"""Runs the trials of a sweep through Ray Tune, several at once, each in a folder of its own, and reports the best.

The sweep's folder holds a run folder per trial (`optim.lr=0.1/seed-0`), `summary.txt`, `sweep.png` with their curves,
`best.toml`, and Tune's own files in `tune/`. The same command resumes the trials that are not finished.
"""

import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from loguru import logger
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from distributed.config.scaling import Scaling
from distributed.errors import ExitCode, InputError
from distributed.files import replace_bytes
from distributed.process import logs
from distributed.process.optional_output import OptionalOutput
from distributed.process.signals import SignalStop
from distributed.report.comparison import curves_as_png
from distributed.report.history import read_history
from distributed.training.stop import StopSource
from launch.on_ray.capacity import capacity, wait_for_capacity
from launch.on_ray.cluster import CheckedNodes, check_nodes
from launch.on_ray.connection import connected
from launch.on_ray.driver import run_attempts
from launch.on_ray.environment import set_environment
from launch.on_ray.settings import Training
from launch.on_ray.worker import ClusterStop, clear_stop, request_stop
from launch.summary import write_summary

# Tune requires a reservation for each trial; a reserved core would be missing for a worker.
_TRIAL_RESOURCES = {"node:__internal_head__": 0.001}
_POLL_SECONDS = 0.25


def run(trainings: Sequence[Training], metric: str) -> ExitCode:
    """Run all unfinished trainings, as many at once as fit on the cluster, then report the best by a metric."""
    folder = trainings[0].sweep_folder
    unfinished = [training for training in trainings if not training.finished]
    code = ExitCode.FINISHED
    if unfinished:
        try:
            with connected(unfinished[0].config.logging.level), SignalStop(launched=False) as stop:
                code = _train(folder, unfinished, stop)
        except InputError as error:
            for line in error.lines:
                logger.error("{}", line)
            return ExitCode.BAD_INPUT
    if any((training.config.run_dir / "config.toml").is_file() for training in trainings):
        conclude(folder, trainings, metric)
    return code


def _train(folder: Path, trainings: Sequence[Training], stop: StopSource) -> ExitCode:
    scaling = trainings[0].scaling
    if any(training.scaling != scaling for training in trainings):
        raise InputError("sweep.device: trials on cuda and on cpu need different workers; run one sweep per device")
    if not wait_for_capacity(scaling, stop.requested, excluded=()):
        return ExitCode.STOPPED
    check_nodes(trainings[0].config, scaling, CheckedNodes(), started=False)
    concurrent = max(1, capacity(scaling).runs_when_idle)
    logger.info(
        "trials: {}, workers per trial: {}, trials at once: {}",
        len(trainings),
        scaling.num_workers,
        concurrent,
    )
    key = uuid.uuid4().hex
    tuner = tune.Tuner(
        tune.with_resources(partial(_trial, trainings=trainings, scaling=scaling, stop_key=key), _TRIAL_RESOURCES),
        param_space={"training": tune.grid_search([training.name for training in trainings])},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    reason: str | None = None
    with ThreadPoolExecutor(1) as thread:  # in the main thread, Tune would handle Ctrl-C itself
        results = thread.submit(tuner.fit)
        while not wait([results], timeout=_POLL_SECONDS).done:
            if not reason and (reason := stop.requested()):
                request_stop(key, reason)
    clear_stop(key)
    codes = [_exit_code(result) for result in cast(Iterable[Any], results.result())]
    if reason and ExitCode.STOPPED in codes:
        logger.warning("stopped by {}, everything saved; the same command resumes", reason)
    return max(codes)


def _trial(space: dict[str, Any], *, trainings: Sequence[Training], scaling: Scaling, stop_key: str) -> None:
    """Drive one training, as a trial of Tune."""
    set_environment()
    training = next(one for one in trainings if one.name == space["training"])
    logs.terminal_logs(0, level=training.config.logging.level)
    logger.info("starting {}", training.name)
    report_to_tune: Any = TuneReportCallback
    try:
        with ClusterStop(stop_key, nodes={}) as stop:
            # Tune starts no more trainings than fit, so each can wait for the workers that another one is about to release.
            code = run_attempts(training.config, scaling, stop, callbacks=[report_to_tune()], in_sweep=True)
    except InputError as error:
        for line in error.lines:
            logger.error("{}: {}", training.name, line)
        code = ExitCode.BAD_INPUT
    tune.report({"exit_code": int(code)})


def _exit_code(result: Any) -> ExitCode:
    if result.error is not None or not result.metrics:
        logger.error("{}: {}", result.path, str(result.error).strip().splitlines()[-1])
        return ExitCode.FAILED
    return ExitCode(result.metrics.get("exit_code", ExitCode.FAILED))


def conclude(folder: Path, trainings: Sequence[Training], metric: str) -> None:
    """Write and print the table, write the settings of the best run, and draw all curves."""
    print(write_summary(folder, metric), end="", flush=True)
    started = [training for training in trainings if (training.config.run_dir / "config.toml").is_file()]
    runs = [replace(read_history(training.config.run_dir), name=training.name) for training in started]
    if any(run.log.best("validation") for run in runs):
        with OptionalOutput(folder / "sweep.png"):
            replace_bytes(folder / "sweep.png", curves_as_png(runs))
            print(f"curves: {folder / 'sweep.png'}", flush=True)
