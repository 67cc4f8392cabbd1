import json
from pathlib import Path
from typing import Any

import pytest
from kit.abuse import call

from distributed import compare as module
from distributed.compare import Comparison, Divergence, compare, differing_conditions
from distributed.config import TrainConfig, as_toml
from distributed.report.comparison import comparison_sections
from distributed.report.history import read_history
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import MetricsRecord

STEPS = [{"kind": "train", "step": step, "epoch": 0, "loss": 1 / step, "images_per_second": 7.0} for step in (1, 2, 4)]
EPOCH = {"kind": "epoch", "step": 4, "epoch": 0, "train_loss": 0.5, "test": {"loss": 0.25}, "seconds": 3.0}
SAVES = [{"name": f"step-{step:08d}-epoch-000", "tensors": {"a": f"{step}a", "b": f"{step}b"}} for step in (2, 4)]


def run_of(folder: Path, logged: list[dict[str, Any]], saves: list[dict[str, Any]]) -> RunFolder:
    folder.mkdir()
    run = RunFolder(folder)
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in logged))
    run.digests_file.write_text("".join(json.dumps(line) + "\n" for line in saves))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return run_of(tmp_path / "a", [*STEPS, EPOCH], SAVES)


def test_timings_are_not_compared(run: RunFolder, tmp_path: Path) -> None:
    faster = [{**line, "images_per_second": 8.0, "seconds": 1.0, "memory_mib": 5.0} for line in (*STEPS, EPOCH)]
    assert compare(run, run_of(tmp_path / "b", faster, SAVES)) == Comparison([], logged=4, saves=2)


def test_only_what_both_runs_have_is_compared(run: RunFolder, tmp_path: Path) -> None:
    shorter = run_of(tmp_path / "b", STEPS[:2], SAVES[:1])
    assert compare(run, shorter) == compare(shorter, run) == Comparison([], logged=2, saves=1)


def test_a_split_that_one_run_did_not_evaluate_is_not_compared(run: RunFolder, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", [*STEPS, {**EPOCH, "test": None}], SAVES)
    assert compare(run, other) == compare(other, run) == Comparison([], logged=4, saves=2)


def test_means_over_different_steps_are_not_compared(run: RunFolder, tmp_path: Path) -> None:
    """The mean over steps 3 and 4 is not comparable to the mean over steps 2 to 4."""
    other = run_of(tmp_path / "b", [STEPS[0], {**STEPS[2], "loss": 0.75}], [])
    assert compare(run, other) == Comparison([], logged=1, saves=0)


@pytest.mark.parametrize(
    ("place", "change", "expected"),
    [
        (1, {"loss": 0.25}, Divergence(2, "logged for steps 2 to 2: loss 0.5 | 0.25")),
        (2, {"loss": 0.125}, Divergence(4, "logged for steps 3 to 4: loss 0.25 | 0.125")),
        (3, {"train_loss": 0.75}, Divergence(4, "logged for epoch 1: train_loss 0.5 | 0.75")),
    ],
)
def test_the_first_differing_metric_is_reported(
    run: RunFolder, tmp_path: Path, place: int, change: dict[str, float], expected: Divergence
) -> None:
    lines = [*STEPS, EPOCH]
    lines[place] = {**lines[place], **change}
    assert compare(run, run_of(tmp_path / "b", lines, SAVES)).divergences == [expected]


def test_the_first_differing_save_is_reported(run: RunFolder, tmp_path: Path) -> None:
    one = [SAVES[0], {**SAVES[1], "tensors": {"a": "4a", "b": "another"}}]
    both = [{**save, "tensors": {"a": "x", "b": "y"}} for save in SAVES]
    found = compare(run, run_of(tmp_path / "b", STEPS, one))
    assert found.divergences == [Divergence(4, "saved after step 4: b")]
    found = compare(run, run_of(tmp_path / "c", STEPS, both))
    assert found.divergences == [Divergence(2, "saved after step 2: a and 1 other tensor of 2")]


def test_a_missing_tensor_is_a_difference(run: RunFolder, tmp_path: Path) -> None:
    lacking = [{**save, "tensors": {"a": save["tensors"]["a"]}} for save in SAVES]
    other = run_of(tmp_path / "b", STEPS, lacking)
    for found in (compare(run, other), compare(other, run)):
        assert found.divergences == [Divergence(2, "saved after step 2: b")]


def test_truncated_lines_are_skipped(run: RunFolder, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", [*STEPS, EPOCH], SAVES)
    for file in (other.metrics_file, other.digests_file):
        with file.open("a") as lines:
            lines.write('{"kind": "train", "na')
    assert compare(run, other) == Comparison([], logged=4, saves=2)


def test_the_report_reads_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    runs = [run_of(tmp_path / name, [*STEPS, EPOCH], SAVES) for name in "abcd"]
    for run in runs:
        run.config_file.write_text(as_toml(TrainConfig()))
    original = module.read_metrics

    def counted(file: Path) -> list[MetricsRecord]:
        read.append(str(file))
        return original(file)

    monkeypatch.setattr(module, "read_metrics", counted)
    assert "a and b are bit-identical" in comparison_sections([read_history(run.path) for run in runs])[-1]
    assert read == [str(run.metrics_file) for run in runs]


def test_the_last_of_repeated_saves_counts(run: RunFolder, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", [*STEPS, EPOCH], [{**SAVES[0], "tensors": {"a": "z", "b": "z"}}, *SAVES])
    assert compare(run, other) == Comparison([], logged=4, saves=2)


def test_without_files_nothing_is_in_common(run: RunFolder, tmp_path: Path) -> None:
    assert compare(run, RunFolder(tmp_path / "none")) == Comparison([], logged=0, saves=0)


def attempt(world_size: int, shards: int, torch: str) -> str:
    bits = {"shards": shards, "versions": {"torch": torch}}
    return json.dumps({"event": "started", "world_size": world_size, "bits": bits, "git": None}) + "\n"


def test_differing_conditions_list_each_value_once(run: RunFolder, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", STEPS, SAVES)
    run.attempts_file.write_text(
        attempt(2, 8, "2.15") + attempt(2, 8, "2.15") + json.dumps({"event": "finished"}) + "\n"
    )
    other.attempts_file.write_text(attempt(3, 8, "2.15") + attempt(1, 8, "2.16"))
    assert differing_conditions(run, other) == ["world_size: 2 | 3, 1", "version of torch: 2.15 | 2.15, 2.16"]
    assert differing_conditions(run, run) == []


def test_configs_of_runs_without_checkpoints_are_compared(run: RunFolder, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", [*STEPS, {**EPOCH, "train_loss": 0.75}], [])
    for one, epochs in ((run, 3), (other, 4)):
        one.config_file.write_text(as_toml(TrainConfig(epochs=epochs)))
    assert "  config: epochs = 3 | 4" in call("compare", run.path, other.path).out.splitlines()


def test_results_are_shown_side_by_side(run: RunFolder, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", [*STEPS, {**EPOCH, "test": {"accuracy": 0.5}, "train_loss": 0.75}], SAVES)
    for one, status in ((run, "finished"), (other, "stopped")):
        one.config_file.write_text(as_toml(TrainConfig(epochs=3)))
        (one.path / "status.json").write_text(json.dumps({"status": status}))
    found = call("compare", run.path, other.path)
    assert found.out.startswith("not bit-identical: ")
    assert "  diverged by step 4: logged for epoch 1: " in found.out
    rows = {line.split("  ")[0]: line.split() for line in found.out.splitlines()}
    assert (found.code, rows["status"][-2:]) == (1, ["finished", "stopped"])
    assert rows["epochs"][1:] == ["1", "of", "3", "1", "of", "3"]
    assert rows["test"][1:] == ["-", "50.00%", "(epoch", "1)"]


def test_settings_are_written_as_in_a_config_file(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run_of(tmp_path / "b", STEPS, SAVES)
    changed = {"channels_last": False, "precision": "float32", "early_stopping": {}}
    configs = {run: TrainConfig(precision="bfloat16"), other: TrainConfig(**changed)}
    monkeypatch.setattr(RunFolder, "saved_config", lambda run: configs[run])
    assert differing_conditions(run, other)[:2] == [
        'config: precision = "bfloat16" | "float32"',
        "config: channels_last = true | false",
    ]
    assert 'config: early_stopping.metric = "none" | "accuracy"' in differing_conditions(run, other)


def test_different_images_are_a_difference(run: RunFolder, tmp_path: Path) -> None:
    other = run_of(tmp_path / "b", STEPS, SAVES)
    for one, digest in ((run, "aa"), (other, "bb")):
        line = json.loads(attempt(2, 8, "2.15"))
        line["images"] = {"train": {"size": 9, "digest": digest, "order": "01"}, "test": {"size": 3, "digest": "dd"}}
        one.attempts_file.write_text(json.dumps(line) + "\n")
    (line,) = differing_conditions(run, other)
    assert line == "train images: size 9, digest aa, order 01 | size 9, digest bb, order 01"


@pytest.mark.parametrize("images", [None, 3, [1], {"train": 3}, {"train": None}])
def test_lines_with_damaged_images_are_skipped(run: RunFolder, images: object) -> None:
    run.attempts_file.write_text(json.dumps(json.loads(attempt(2, 8, "2.15")) | {"images": images}) + "\n")
    assert differing_conditions(run, run) == []
