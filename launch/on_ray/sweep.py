"""Several trainings at once through Ray Tune, each the same recipe in a folder of its own; then which is the best.

In the sweep's folder: a folder a training (`optim.lr=0.1`), `summary.txt`, `sweep.png` with their curves, `best.toml`, and
Tune's own record in `tune/`. The same command again goes on with those that are not finished.
"""

import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, cast

from loguru import logger
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from distributed.config import as_toml, with_values
from distributed.config.sections import Scaling
from distributed.errors import ExitCode, InputError
from distributed.files import replace_bytes, replace_text
from distributed.process import logs
from distributed.process.optional_output import OptionalOutput
from distributed.process.signals import SignalStop
from distributed.report.comparison import curves_as_png
from distributed.report.history import read_history
from distributed.training.stop import StopSource
from launch.on_ray.cluster import NoRoom, room
from launch.on_ray.driver import attempts, connected
from launch.on_ray.environment import set_environment
from launch.on_ray.settings import Training
from launch.on_ray.worker import ClusterStop, ask_to_stop, forget
from launch.summary import summary

_BESIDE_THE_DRIVER = {"node:__internal_head__": 0.001}  # Tune wants something reserved, and a core would miss a worker


def run(trainings: Sequence[Training]) -> ExitCode:
    """Train all that are not finished, as many at once as the cluster has room for; then tell which is the best."""
    folder = trainings[0].config.run_dir.parent
    left = [training for training in trainings if not training.finished]
    code = ExitCode.FINISHED
    if left:
        try:
            with connected(left[0].config.logging.level), SignalStop(launched=False) as stop:
                code = _train(folder, left, stop)
        except InputError as error:
            for line in error.lines:
                logger.error("{}", line)
            return ExitCode.BAD_INPUT
    conclude(folder, trainings)
    return code


def _train(folder: Path, trainings: Sequence[Training], stop: StopSource) -> ExitCode:
    scaling = trainings[0].scaling
    found = room(scaling)
    if found.if_empty < scaling.least_workers:
        raise NoRoom(
            f"{scaling.least_workers} workers are asked for each training, and the cluster has room for {found.if_empty}: "
            f"{found.words}; lower scaling.num_workers, or add nodes"
        )
    at_once = max(1, found.if_empty // scaling.num_workers)
    logger.info("{} trainings of {} workers, {} at once", len(trainings), scaling.num_workers, at_once)
    key = uuid.uuid4().hex
    # Tune starts no more than fit, so each may wait for what another one is about to leave.
    patient = scaling.model_copy(update={"wait_seconds": 1e7})
    tuner = tune.Tuner(
        tune.with_resources(partial(_trial, trainings=trainings, scaling=patient, stop_key=key), _BESIDE_THE_DRIVER),
        param_space={"training": tune.grid_search([training.name for training in trainings])},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    with ThreadPoolExecutor(1) as thread:  # not the main thread, where Tune would take Ctrl-C for itself
        results, asked = thread.submit(tuner.fit), False
        while not wait([results], timeout=0.25).done:
            if not asked and (reason := stop.requested()):
                ask_to_stop(key, reason)
                asked = True
    forget(key)
    codes = [_code_of(one) for one in cast(Iterable[Any], results.result())]
    if asked and ExitCode.STOPPED in codes:
        logger.warning("stopped by {}, everything saved; the same command goes on from here", stop.requested())
    return max(codes)


def _trial(space: dict[str, Any], *, trainings: Sequence[Training], scaling: Scaling, stop_key: str) -> None:
    """The driver of one training, as Tune runs it."""
    set_environment()
    training = next(one for one in trainings if one.name == space["training"])
    logs.terminal_logs(0, level=training.config.logging.level)
    logger.info("{} begins", training.name)
    tells_tune: Any = TuneReportCallback
    with ClusterStop(stop_key, nodes={}) as stop:
        code = attempts(training.config, scaling, stop, callbacks=[tells_tune()])
    tune.report({"exit_code": int(code)})


def _code_of(result: Any) -> ExitCode:
    if result.error is not None or not result.metrics:
        logger.error("{}: {}", result.path, str(result.error).strip().splitlines()[-1])
        return ExitCode.FAILED
    return ExitCode(result.metrics.get("exit_code", ExitCode.FAILED))


def conclude(folder: Path, trainings: Sequence[Training]) -> None:
    """Write and print the table, draw the curves, and write the settings of the best by its best validation accuracy."""
    text = summary(folder)
    print(text, end="", flush=True)
    with OptionalOutput(folder / "summary.txt"):
        replace_text(folder / "summary.txt", text)
    runs = [read_history(training.config.run_dir) for training in trainings if _has_begun(training)]
    measured = [(found.value, one) for one in runs if (found := one.log.best("validation"))]
    if not measured:
        return
    with OptionalOutput(folder / "sweep.png"):
        replace_bytes(folder / "sweep.png", curves_as_png(runs))
    accuracy, best = max(measured, key=lambda one: one[0])
    config = with_values(best.config, run_dir=folder / "best")
    with OptionalOutput(folder / "best.toml"):
        replace_text(folder / "best.toml", f"# {best.name}: {accuracy:.2%} of the validation images\n{as_toml(config)}")
    print(f"best: {best.name}, {accuracy:.2%} of the validation images; its settings: {folder / 'best.toml'}, "
          f"curves: {folder / 'sweep.png'}", flush=True)  # fmt: skip


def _has_begun(training: Training) -> bool:
    return (training.config.run_dir / "config.toml").is_file()
