"""The result of a run is read from its folder: accuracies, settings beside the catalogue's, machine, curve, command."""

import json
from pathlib import Path
from typing import Any

import pytest
from kit.run_folders import checkpointed
from loguru import logger

from distributed.config import from_command_line
from distributed.experiments.catalogue import CATALOGUE, Ablation, Experiment
from distributed.experiments.plan import planned_arguments
from distributed.experiments.read_run import read_result
from distributed.experiments.result import Result
from distributed.host.cpu_quota import available_cpus
from distributed.host.identity import host
from distributed.run.folder import RunFolder

I_10, S1_10 = CATALOGUE["I-10"], CATALOGUE["S1-10"]
NO_FLIP = Ablation(
    id="cifar10-no_flip", config="configs/cifar10.toml", change="no flip", changed=("--data.augment.flip=false",),
    settings=("--epochs=2", "--data.augment.flip=false"), base="cifar10-base", alternative=False,
)  # fmt: skip
BITS = {"shards": 8, "device": "a CPU", "versions": {"torch": "2.15.0"}}
STARTED = {
    "event": "started", "time": "2026-11-28T20:00:00+0000", "git": "0123456789ab", "world_size": 2, "host": host(),
    "bits": BITS,
}  # fmt: skip
COMMAND = "python -m distributed.experiments --only"


def epoch(number: int, test: float, *, validation: float | None = None, is_best: bool = False) -> dict[str, Any]:
    """Return the line of metrics.jsonl about an epoch of 90 seconds."""
    split = {} if validation is None else {"validation": {"accuracy": validation, "loss": 1.0}}
    return {
        "kind": "epoch", "epoch": number, "step": 10 * (number + 1), "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5,
        "test": {"accuracy": test, "loss": 1.23456}, "is_best": is_best, "seconds": 90.0, **split,
    }  # fmt: skip


def result_of_run(
    folder: Path,
    experiment: Experiment,
    *replaced: str,
    epochs: list[dict[str, Any]] | None = None,
    attempts: tuple[dict[str, Any], ...] = (STARTED,),
    status: str = "finished",
) -> Result:
    """Read a run of an experiment in which these settings, `--NAME=VALUE`, replace the catalogue's or join them."""
    names = {text.partition("=")[0] for text in replaced}
    planned = [text for text in planned_arguments(experiment) if text.partition("=")[0] not in names]
    checkpointed(folder, from_command_line([*planned, *replaced, "--run_dir", str(folder)]).config)
    run = RunFolder(folder)
    metrics = epochs or [epoch(0, 0.6), epoch(1, 0.7)]
    for file, records in ((run.metrics_file, metrics), (run.attempts_file, attempts)):
        file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    run.status_file.write_text(json.dumps({"status": status}))
    result = read_result(experiment, run)
    assert result is not None
    return result


def test_without_validation_the_last_epoch_counts(tmp_path: Path) -> None:
    result = result_of_run(tmp_path, I_10)
    assert (result.at_epoch, result.test, result.validation, result.test_loss) == (2, 70.0, None, 1.2346)
    assert (result.epochs, result.of_epochs, result.minutes, result.date) == (2, 10, 3.0, "2026-11-28")
    assert result.curve is not None
    assert [(point.epoch, point.minutes, point.train, point.test) for point in result.curve] == [
        (1, 1.5, 50.0, 60.0),
        (2, 3.0, 50.0, 70.0),
    ]


def test_with_validation_the_best_epoch_counts(tmp_path: Path) -> None:
    epochs = [epoch(0, 0.6, validation=0.65, is_best=True), epoch(1, 0.7, validation=0.55)]
    result = result_of_run(tmp_path, S1_10, epochs=epochs)
    assert (result.at_epoch, result.test, result.validation) == (1, 60.0, 65.0)
    assert (result.ended_early, result.is_complete) == (True, True)


def test_a_stopped_run_has_not_ended_early(tmp_path: Path) -> None:
    result = result_of_run(tmp_path, I_10, status="stopped")
    assert (result.ended_early, result.is_complete) == (False, False)


@pytest.mark.parametrize(
    ("experiment", "replaced", "settings"),
    [
        (I_10, (), ()),
        (I_10, ("--seed=7", "--threads=1", "--data.root=/somewhere", "--device=cpu"), ()),
        (I_10, ("--precision=float32", "--epochs=3"), ("--epochs=3",)),  # the plan's auto may stand for float32
        (I_10, ("--channels_last=false", "--epochs=3"), ("--channels_last=false", "--epochs=3")),
        (I_10, ("--exact.shards=0",), ("--exact.shards=0",)),
        (S1_10, ("--epochs=3",), ()),  # of a plateau schedule, which may continue to 400
        (NO_FLIP, (), ("--data.augment.flip=false", "--epochs=2")),
        (NO_FLIP, ("--epochs=1",), ("--data.augment.flip=false", "--epochs=1")),
        (NO_FLIP, ("--data.augment.flip=alternating",), ("--data.augment.flip=alternating", "--epochs=2")),
    ],
)  # fmt: skip
def test_settings_are_those_that_change_the_experiment(
    tmp_path: Path, experiment: Experiment, replaced: tuple[str, ...], settings: tuple[str, ...]
) -> None:
    assert result_of_run(tmp_path, experiment, *replaced).settings == settings


def test_settings_of_another_optimizer_name_only_its_own(tmp_path: Path) -> None:
    settings = result_of_run(tmp_path, I_10, "--optim.name=adamw").settings
    assert "--optim.name=adamw" in settings
    assert not any("momentum" in text or "nesterov" in text for text in settings)
    planned = planned_arguments(I_10)
    again = from_command_line([*planned, *settings]).config
    assert again.optim == from_command_line([*planned, "--optim.name=adamw"]).config.optim


def test_the_command_repeats_the_run(tmp_path: Path) -> None:
    result = result_of_run(tmp_path, NO_FLIP, "--epochs=1", "--seed=7", "--data.root=/somewhere")
    assert result.command == f"{COMMAND} cifar10-no_flip --seeds 7 --nproc_per_node 2 --data.root FOLDER --epochs=1"
    assert (result.seed, result.processes) == (7, "2")


def test_all_attempts_are_in_the_record(tmp_path: Path) -> None:
    attempts = (
        STARTED,
        {"event": "stopped", "step": 5},
        STARTED | {"git": "ba9876543210+changes", "world_size": 1, "time": "2026-11-29T01:00:00+0000"},
        STARTED | {"git": "ba9876543210+changes", "world_size": 1, "time": "2026-11-30T01:00:00+0000"},
    )
    result = result_of_run(tmp_path, I_10, attempts=attempts)
    assert (result.attempts, result.processes, result.date) == (3, "2 then 1", "2026-11-30")
    assert result.revision == "0123456789ab then ba9876543210+changes"
    assert result.command == f"{COMMAND} I-10 --seeds 0 --data.root FOLDER"


@pytest.mark.parametrize(
    ("changes", "kind", "cores"),
    [
        ({}, "cpu", available_cpus()),
        ({"host": "another.example"}, "cpu", None),
        ({"bits": BITS | {"CUDA": "13.0"}}, "gpu", available_cpus()),
    ],
    ids=["this host", "another host", "a GPU"],
)
def test_the_machine_is_recorded(tmp_path: Path, changes: dict[str, Any], kind: str, cores: int | None) -> None:
    machine = result_of_run(tmp_path, I_10, attempts=(STARTED | changes,)).machine
    assert (machine.kind, machine.device, machine.cores) == (kind, "a CPU", cores)


def test_all_machines_of_a_run_are_recorded(tmp_path: Path) -> None:
    elsewhere = STARTED | {"host": "another.example", "bits": BITS | {"device": "another CPU"}}
    machine = result_of_run(tmp_path, I_10, attempts=(elsewhere, STARTED, STARTED)).machine
    assert (machine.kind, machine.device, machine.cores) == ("cpu", "another CPU then a CPU", None)


@pytest.mark.parametrize(
    ("attempts", "problem"),
    [
        ((STARTED | {"bits": BITS | {"CUDA": "13.0"}}, STARTED), "was trained on a CPU and on a GPU"),
        ((STARTED | {"bits": {"device": "a CPU"}},), "does not say what it was trained on"),
        ((STARTED | {"bits": None},), "does not say what it was trained on"),
        ((), "does not say what it was trained on"),
    ],
    ids=["two kinds", "no shards", "nothing", "no attempt"],
)
def test_a_run_on_no_single_kind_of_device_is_left_out(
    tmp_path: Path, attempts: tuple[dict[str, Any], ...], problem: str
) -> None:
    result_of_run(tmp_path, I_10)
    run = RunFolder(tmp_path)
    run.attempts_file.write_text("".join(f"{json.dumps(record)}\n" for record in attempts))
    warnings: list[str] = []
    sink = logger.add(warnings.append, format="{message}", level="WARNING")
    assert read_result(I_10, run) is None
    logger.remove(sink)
    assert warnings == [f"{tmp_path}: {problem}, so its result is left out\n"]


def test_outside_a_checkout_there_is_no_revision(tmp_path: Path) -> None:
    assert result_of_run(tmp_path, I_10, attempts=(STARTED | {"git": ""},)).revision is None
