"""The command that runs the experiments, shortened, on generated images."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kit.cluster import wait_for
from kit.commands import Command

from distributed.config import from_command_line
from distributed.experiments.catalogue import REFERENCES, Reference
from distributed.run.folder import RunFolder
from distributed.run.records import read_attempts

SHORT = (
    "--data.name generated10 --data.train_samples 300 --data.test_samples 50 --threads 1 --device cpu "
    "--logging.tensorboard false"
)
ROOT = Path(__file__).parents[2]


def command_of(tmp_path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "distributed.experiments", "--runs", str(tmp_path / "runs"),
            "--out", str(tmp_path / "results.json"), *arguments]  # fmt: skip


def experiments(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = command_of(tmp_path, *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def records_in(tmp_path: Path) -> list[dict]:
    return json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.id)
def test_every_reference_result_has_a_config_with_a_header(reference: Reference):
    name = reference.id
    header = (ROOT / reference.config).read_text()
    config = from_command_line([str(ROOT / reference.config)]).config
    assert header.startswith(f"# {name}: {config.model.name} on CIFAR-{name.split('-')[1] if name[0] == 'S' else 10}")
    assert f"configs/seeds/{name}.toml --data.root" in header
    assert f"test {reference.test:g}" in header or f"test {reference.test:.2f}" in header
    assert config.data.name == ("cifar100" if name.endswith("-100") else "cifar10")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_experiments_are_recorded_and_finished_runs_skipped(tmp_path):
    arguments = ["--only", "I-10", "--seeds", "3", "0", *SHORT.split(), "--epochs", "2"]
    done = experiments(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    records = records_in(tmp_path)
    again = experiments(tmp_path, *arguments)
    assert again.returncode == 0
    assert again.stderr.count("this run is finished") == 2
    assert again.stdout.split("| id |")[1] == done.stdout.split("| id |")[1]
    assert records_in(tmp_path) == records
    assert [(each["id"], each["seed"], each["epochs"], each["of_epochs"]) for each in records] == [
        ("I-10", 0, 2, 10),
        ("I-10", 3, 2, 10),
    ]
    settings = ["--data.name=generated10", "--data.test_samples=50", "--data.train_samples=300", "--epochs=2"]
    record = records[1]
    assert record["settings"] == settings
    assert (
        record["command"]
        == f"python -m distributed.experiments --only I-10 --seeds 3 --precision {record['precision']} {' '.join(settings)}"
    )
    assert "torch" in record["versions"]
    assert (record["machine"]["kind"], record["machine"]["cores"] >= 1) == ("cpu", True)
    assert [point["epoch"] for point in record["curve"]] == [1, 2]
    assert record["curve"][1]["test"] == record["test"]
    assert record["curve"][1]["minutes"] == pytest.approx(record["minutes"], abs=1e-3)
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_out_of_time_saves_and_resumes(tmp_path):
    """With a constant learning rate a run may be resumed with fewer epochs, so that it ends soon on any machine."""
    arguments = ["--only", "I-10", *SHORT.split(), "--schedule.name", "constant"]
    run = RunFolder(tmp_path / "runs" / "I-10-0")
    for minutes in ("0.4", "1", "2"):  # a loaded machine needs longer to start
        stopped = experiments(tmp_path, *arguments, "--epochs", "100000", "--minutes", minutes)
        assert stopped.returncode == 75, stopped.stderr
        if records_in(tmp_path):
            break
    saved = run.status()
    assert (saved.status, saved.saved_step) == ("stopped", saved.step)
    [before] = records_in(tmp_path)
    finished = experiments(tmp_path, *arguments, "--epochs", str(before["epochs"] + 2))
    assert finished.returncode == 0, finished.stderr
    starts = [entry.step for entry in read_attempts(run.attempts_file) if entry.event == "started"]
    assert starts[-1] == saved.step > 0
    [record] = records_in(tmp_path)
    assert (record["epochs"], record["attempts"]) == (before["epochs"] + 2, len(starts))
    assert record["curve"][: before["epochs"]] == before["curve"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_ends_the_run_too(number: signal.Signals, tmp_path):
    run = RunFolder(tmp_path / "runs" / "I-10-0")
    arguments = command_of(tmp_path, "--only", "I-10", *SHORT.split(), "--epochs", "100000")
    with Command(arguments, output=tmp_path / "output", cwd=ROOT) as command:
        command.wait_for(lambda: run.status().status == "running", what="the run to start")
        command.process.send_signal(number)
        assert command.wait() == (-number if number == signal.SIGKILL else 128 + number), command.text
        if number == signal.SIGKILL:
            wait_for(lambda: run.status().status == "stopped", seconds=60, description="the run to save and stop")
        assert run.status().status == "stopped", "the run saved before the command ended"


def test_invalid_settings_are_refused_before_the_first_run(tmp_path):
    refused = experiments(tmp_path, "--only", "I-10", "--optim.lr", "fast")
    assert refused.returncode == 2
    assert refused.stderr == "error: command line: optim.lr = fast: should be a valid number\n"
    assert "torch.distributed.run" not in refused.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_next_run_starts_after_a_failed_one(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "I-10-0").write_text("a file where the run folder belongs")
    failed = experiments(tmp_path, "--only", "I-10", "I-50", *SHORT.split(), "--epochs", "1")
    assert failed.returncode not in (0, 75), failed.stderr
    assert "another with --run_dir" in failed.stderr
    assert [record["id"] for record in records_in(tmp_path)] == ["I-50"]


def test_a_damaged_file_is_refused_before_the_first_run(tmp_path):
    (tmp_path / "results.json").write_text("[{}]")
    refused = experiments(tmp_path, "--only", "I-10", *SHORT.split())
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"error: {tmp_path / 'results.json'}: not a list of results (0.id: Field required)"
    )
    assert refused.stderr.count("\n") == 1
    assert "torch.distributed.run" not in refused.stdout
