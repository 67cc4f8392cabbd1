"""The catalogue of experiments, and the file of results, which keeps the records of other runs and machines."""

import json
from pathlib import Path

import pytest
from kit.results import CPU, GPU, curve_of, result_of

from distributed.config import from_command_line
from distributed.errors import InputError
from distributed.experiments.catalogue import ABLATIONS, CATALOGUE, RECIPES, REFERENCES, Ablation, Experiment, chosen
from distributed.experiments.plan import planned_arguments, planned_run, setting_path
from distributed.experiments.read_run import read_result
from distributed.experiments.records import merged, read_results, write_results
from distributed.experiments.result import Result
from distributed.experiments.summary import summary
from distributed.run.folder import RunFolder

FIRST = result_of("I-10", curve=curve_of(70.0, 83.7))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_results([FIRST], tmp_path / "folder" / "results.json")
    return tmp_path / "folder" / "results.json"


@pytest.mark.parametrize("experiment", CATALOGUE.values(), ids=list(CATALOGUE))
def test_every_experiment_can_be_run(experiment: Experiment) -> None:
    assert from_command_line(planned_arguments(experiment)).config.seed == 0


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.id)
def test_an_ablation_differs_from_its_base_in_its_change(ablation: Ablation) -> None:
    base = CATALOGUE[ablation.base]
    assert (base.config, base.seeds) == (ablation.config, ablation.seeds)
    changed = set(map(setting_path, ablation.changed))
    kept = {text for text in base.settings if setting_path(text) not in changed}
    assert set(ablation.settings) == kept | set(ablation.changed)
    assert ablation.changed
    assert (ablation.changed == base.settings) == ablation.is_base == (base is ablation)
    assert "data.validation_fraction" in map(setting_path, base.settings)


def test_a_setting_of_the_user_replaces_that_of_the_catalogue(tmp_path: Path) -> None:
    experiment = Experiment(
        id="flip", config="configs/cifar10.toml", settings=("--epochs=2", "--data.augment.flip=false")
    )
    run = planned_run(experiment, 3, tmp_path, ["--epochs", "1", "--precision=float32"])
    config = from_command_line(run.arguments).config
    assert (config.epochs, config.data.augment.flip, config.precision, config.seed) == (1, False, "float32", 3)
    assert config.run_dir == run.folder.path == tmp_path / "flip-3"


def test_a_config_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config file .*configs/none.toml: No such file"):
        planned_run(Experiment(id="none", config="configs/none.toml"), 0, tmp_path, [])


def test_ids_are_unique_and_kinds_are_chosen_together() -> None:
    assert len(CATALOGUE) == len(REFERENCES) + len(RECIPES) + len(ABLATIONS)
    assert chosen(["reference"]) == [*REFERENCES]
    assert chosen(["cifar10_fast", "I-50", "I-50"]) == [CATALOGUE["I-50"], CATALOGUE["cifar10_fast"]]


@pytest.mark.parametrize(
    "other",
    [
        result_of("I-50"),
        result_of("I-10", seed=1),
        result_of("I-10", machine=GPU),
        result_of("I-10", settings=("--precision=float32",)),
    ],
    ids=["experiment", "seed", "device", "settings"],
)
def test_records_of_other_runs_are_kept(file: Path, other: Result) -> None:
    assert len(write_results([other], file)) == 2
    assert {record.key: record for record in read_results(file)} == {FIRST.key: FIRST, other.key: other}


def test_results_are_read_back_unchanged(file: Path) -> None:
    before = file.read_text()
    assert read_results(file) == [FIRST]
    write_results([], file)
    assert file.read_text() == before
    assert '{"epoch": 2, "minutes": 2.0, "train": 50.0, "validation": null, "test": 83.7}' in before


def test_a_missing_run_does_not_erase_its_record(file: Path, tmp_path: Path) -> None:
    assert read_result(CATALOGUE["I-10"], RunFolder(tmp_path / "no run here")) is None
    assert write_results([], file) == [FIRST]


@pytest.mark.parametrize(
    ("epochs", "ended_early", "replaces"),
    [(9, False, False), (10, False, True), (9, True, True), (1, False, False)],
)
def test_a_record_is_replaced_only_by_equal_progress(epochs: int, ended_early: bool, replaces: bool) -> None:
    newer = result_of("I-10", epochs=epochs, of_epochs=10, ended_early=ended_early, machine=CPU | {"device": "newer"})
    assert merged([FIRST], [newer]) == [newer if replaces else FIRST]


def test_a_complete_run_of_another_plan_replaces_a_record() -> None:
    earlier = result_of("cifar10_best", epochs=22)
    newer = result_of("cifar10_best", epochs=20)
    assert merged([earlier], [newer]) == [newer]
    assert merged([earlier], [result_of("cifar10_best", epochs=3, of_epochs=20)]) == [earlier]


def test_an_early_stopped_run_replaces_an_unfinished_one() -> None:
    unfinished = result_of("S1-10", epochs=300, of_epochs=400)
    ended = result_of("S1-10", epochs=250, of_epochs=400, ended_early=True)
    assert merged([unfinished], [ended]) == [ended]
    assert (unfinished.is_complete, ended.is_complete) == (False, True)


def test_records_are_in_the_order_of_the_catalogue() -> None:
    retired = result_of("I-10").model_copy(update={"id": "A-retired-ablation"})
    ordered = [FIRST, result_of("I-50"), result_of("cifar10_fast"), result_of("cifar10_fast", seed=1), retired]
    assert merged(ordered[::-1], []) == ordered


@pytest.mark.parametrize(
    "content",
    ["", "{}x", "5", '{"a": 1}', '[{"id": "I-10"}]', "[1]", "unsorted"],
)
def test_a_file_of_something_else_is_refused_unchanged(file: Path, content: str) -> None:
    if content == "unsorted":
        record = FIRST.model_dump(mode="json") | {"settings": ["--seed=1", "--epochs=2"]}
        content = json.dumps([record])
    file.write_text(content)
    with pytest.raises(InputError, match="not a list of results") as refused:
        write_results([FIRST], file)
    assert len(refused.value.lines) == 1
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("processes", "text"), [("1", "1 process,"), ("2", "2 processes,"), ("1 then 2", "1 then 2 processes,")]
)
def test_the_number_of_processes_is_formatted(processes: str, text: str) -> None:
    assert f"| a CPU, {text} bfloat16, exact (8) |" in summary([result_of(processes=processes)])
