from pathlib import Path

import pytest

from distributed.errors import InputError
from launch.summary import summary, write_summary


def make_run(path: Path, *, status: str = "finished", accuracy: float = 0.5) -> None:
    path.mkdir(parents=True)
    (path / "config.toml").write_text("")
    (path / "status.json").write_text(f'{{"status": "{status}", "step": 3}}')
    (path / "metrics.jsonl").write_text(
        f'{{"kind": "epoch", "step": 3, "epoch": 0, "test": {{"accuracy": {accuracy}}}}}\n'
    )


def test_finished_seeds_have_mean_and_deviation(tmp_path: Path):
    make_run(tmp_path / "seed-0", accuracy=0.5)
    make_run(tmp_path / "seed-1", accuracy=0.7)
    make_run(tmp_path / "seed-2", status="stopped", accuracy=0.1)
    _, *runs, spread, unfinished = summary(tmp_path).splitlines()
    assert [line.split()[0] for line in runs] == ["seed-0", "seed-1", "seed-2"]
    assert spread == "over 2 finished seeds: test accuracy 0.6000 ± 0.1414"
    assert unfinished == "unfinished runs: 1 of 3"
    with pytest.raises(InputError, match="no runs"):
        summary(tmp_path / "seed-0")


def test_each_setting_has_a_mean_over_its_seeds(tmp_path: Path):
    for lr, seed, accuracy in ((0.1, 0, 0.5), (0.1, 1, 0.7), (0.2, 0, 0.9)):
        make_run(tmp_path / f"optim.lr={lr}/seed-{seed}", accuracy=accuracy)
    assert summary(tmp_path).splitlines()[4:] == [
        "optim.lr=0.1: over 2 finished seeds: test accuracy 0.6000 ± 0.1414",
        "optim.lr=0.2: over 1 finished seed: test accuracy 0.9000",
    ]


def test_different_settings_have_no_mean(tmp_path: Path):
    for lr in ("0.1", "0.01"):
        make_run(tmp_path / f"optim.lr={lr}")
    assert [line.split()[0] for line in summary(tmp_path).splitlines()[1:]] == ["optim.lr=0.01", "optim.lr=0.1"]


def with_validation(run: Path, accuracies: list[float], losses: list[float]) -> None:
    make_run(run)
    lines = [
        f'{{"kind": "epoch", "step": {epoch}, "epoch": {epoch}, "validation": {{"accuracy": {accuracy}, "loss": {loss}}}}}\n'
        for epoch, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True))
    ]
    (run / "metrics.jsonl").write_text("".join(lines))


def test_the_table_begins_with_the_best_run(tmp_path: Path):
    with_validation(tmp_path / "a", [0.3, 0.2], [1.0, 1.5])
    with_validation(tmp_path / "b", [0.5, 0.4], [3.0, 2.0])
    with_validation(tmp_path / "c/seed-0", [0.4, 0.1], [0.9, 4.0])
    make_run(tmp_path / "d", status="running")
    names = {by: [line.split()[0] for line in summary(tmp_path, by).splitlines()[1:5]]
             for by in ("validation.accuracy", "validation.loss")}  # fmt: skip
    assert names == {"validation.accuracy": ["b", "c/seed-0", "a", "d"], "validation.loss": ["c/seed-0", "a", "b", "d"]}
    assert "0.9000 (epoch 1)" in summary(tmp_path, "validation.loss").splitlines()[1]
    text = write_summary(tmp_path, "validation.loss")
    assert text.endswith(f"best: c/seed-0, validation loss 0.9000; its settings: {tmp_path}/best.toml\n")
    assert (tmp_path / "best.toml").read_text().startswith("# c/seed-0: validation loss 0.9000\n")
    assert (tmp_path / "summary.txt").read_text() == text


def test_a_run_of_the_best_settings_is_not_a_trial(tmp_path: Path):
    with_validation(tmp_path / "a", [0.7], [1.0])
    write_summary(tmp_path, "validation.accuracy")
    with_validation(tmp_path / "best", [0.9], [0.5])
    with_validation(tmp_path / "best/seed-0", [0.9], [0.5])
    assert write_summary(tmp_path, "validation.accuracy").splitlines()[-1].startswith("best: a, ")


def test_the_best_settings_upload_beside_the_trials(tmp_path: Path):
    """Under the trial's own URL a new run would find the trial."""
    with_validation(tmp_path / "optim.lr=0.1/seed-0", [0.5], [1.0])
    (tmp_path / "optim.lr=0.1/seed-0/config.toml").write_text(
        'threads = 3\n[checkpoint]\nupload_to = "s3://bucket/sweep/optim.lr=0.1/seed-0"\n'
    )
    write_summary(tmp_path, "validation.loss")
    best = (tmp_path / "best.toml").read_text()
    assert 'upload_to = "s3://bucket/sweep/best"' in best
    assert f'run_dir = "{tmp_path}/best"' in best
    assert "threads = 0" in best, "another machine has other CPUs"
