"""What the batch scripts ask of Python: arguments, address, port, and whether an attempt is requeued."""

import ast
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distributed.config import from_command_line
from distributed.errors import ExitCode, InputError
from distributed.run.records import AttemptRecord
from launch.address import free_port, reachable, way_to
from launch.doctor.probe import data
from launch.environment import Allocation, fewest_cpus
from launch.slurm.__main__ import tasks
from launch.slurm.requeue import Journal, decide
from launch.summary import summary
from launch.sweep_arguments import of_task, with_folder

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch").glob("*.py"))
STARTED = {"event": "started", "step": 10, "token": "a"}


def decided(
    *lines: dict[str, Any], finished: bool = False, saved: int = 10, signal: str = "", restarts: int = 0
) -> Any:
    return decide(
        [AttemptRecord(**line) for line in lines],
        finished=finished,
        saved_step=saved,
        signal=signal,
        restarts=restarts,
        max_requeues=3,
    )


def test_what_will_not_repeat_is_requeued():
    stopped = {"event": "stopped", "exit_code": 75, "step": 14, "reason": "SIGUSR1"}
    assert decided(STARTED, stopped, signal="USR1").verdict == "requeue"
    assert decided(STARTED, stopped).verdict == "requeue"
    assert decided(signal="USR1").verdict == "requeue", "warned before the trainer was there"
    assert decided(STARTED, saved=15).verdict == "requeue", "killed, after it had saved"
    assert decided(STARTED, stopped, signal="USR1", restarts=3).verdict == "end"
    assert "MAX_REQUEUES = 3" in decided(STARTED, stopped, signal="USR1", restarts=3).reason


def test_success_what_repeats_and_what_slurm_decides_are_not_requeued():
    assert decided(STARTED, finished=True, signal="USR1").verdict == "end"
    assert decided(STARTED, finished=True).exit_code == 0
    for code in (ExitCode.BAD_INPUT, ExitCode.NOT_FINITE, ExitCode.STORAGE):
        failed = {"event": "failed", "exit_code": int(code), "reason": "why"}
        decision = decided(STARTED, failed, saved=99, signal="USR1")
        assert (decision.verdict, decision.exit_code) == ("end", code)
    assert decided(STARTED).verdict == "end", "nothing new was saved"
    assert decided().verdict == "end"
    assert decided(STARTED, signal="TERM").verdict == "leave"


def test_the_journal_tells_of_an_attempt_that_had_no_time_to(tmp_path: Path):
    job = Allocation(job=7, nodes=1, cpus=1, gpus=0, ranks=1, array_task=None, restarts=1, max_requeues=3)
    Journal(tmp_path, "7").begin()
    (tmp_path / "attempts.jsonl").write_text('{"event": "started", "step": 0, "token": "a"}\n')
    Journal(tmp_path, "7").begin()
    text = (tmp_path / "attempts.jsonl").read_text()
    assert '"event": "lost"' in text
    assert text.count('"token": "a"') == 2
    journal = Journal(tmp_path, "7")
    assert journal.end("USR1", job).verdict == "requeue"
    assert "attempt 1: lost without a word" in journal.comment
    assert "attempt 2: ended before it began on Slurm's warning" in journal.comment


def test_a_task_of_an_array_has_its_own_seed_folder_or_line(tmp_path: Path):
    config = str(ROOT / "configs/debug.toml")
    assert of_task([config, "--epochs", "3"], None) == [config, "--epochs", "3"]
    assert of_task([config], 4) == [config, "--seed", "4", "--run_dir", "runs/debug/seed-4"]
    assert with_folder([config, "--run-dir=a"], "b") == [config, "--run_dir", "a/b"]
    up = ["--checkpoint.upload-to", "file:///store/", "--epochs", "3"]
    assert with_folder([config, *up], "b") == [
        config, "--epochs", "3", "--run_dir", "runs/debug/b", "--checkpoint.upload_to", "file:///store/b",
    ]  # fmt: skip
    with pytest.raises(InputError, match="the task's number is the seed"):
        of_task([config, "--seed", "1"], 4)
    (tmp_path / "sweep").write_text(f"{config} --run_dir 'a b'\n")
    assert of_task([f"@{tmp_path}/sweep"], 0) == [config, "--run_dir", "a b"]
    with pytest.raises(InputError, match="has no line"):
        of_task([f"@{tmp_path}/sweep"], 1)


def test_a_sweep_is_every_combination():
    config = str(ROOT / "configs/debug.toml")
    found = tasks([config], seeds=2, sweep=["optim.lr=0.1,0.2"])
    assert len(found) == 4
    assert found[3][1:] == ["--optim.lr", "0.2", "--seed", "1", "--run_dir", "runs/debug/optim.lr=0.2/seed-1"]
    with pytest.raises(InputError, match="SETTING=VALUE"):
        tasks([config], seeds=0, sweep=["optim.lr"])


def test_several_nodes_never_meet_on_loopback():
    assert reachable("127.0.0.1", nodes=1) == "127.0.0.1"
    assert reachable("10.1.2.3", nodes=2) == "10.1.2.3"
    with pytest.raises(InputError, match="loopback"):
        reachable("localhost", nodes=2)
    with pytest.raises(InputError, match="rendezvous address"):
        reachable("no-such-host.invalid", nodes=2)
    assert way_to("127.0.0.1") == ("127.0.0.1", "lo")


def test_a_port_that_is_taken_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("", free_port(12_345)))
        taken.listen()
        port = free_port(12_345)
        assert port != taken.getsockname()[1]
    assert free_port(12_345) != free_port(12_346)


def test_a_probe_in_a_job_looks_for_data_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = from_command_line(["--data.root", str(tmp_path)])
    assert command.names_data
    for name in ("SLURM_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    assert data(command.config, names_data=False) == "none named"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(InputError, match="data_batch_1"):
        data(command.config, names_data=False)


def test_the_node_with_the_fewest_cpus_counts():
    assert fewest_cpus("4") == 4
    assert fewest_cpus("16(x2),2") == 2
    assert fewest_cpus("2,16(x3)") == 2


def a_run(path: Path, *, status: str, accuracy: float) -> None:
    path.mkdir(parents=True)
    (path / "config.toml").write_text("")
    (path / "status.json").write_text(f'{{"status": "{status}", "step": 3}}')
    (path / "metrics.jsonl").write_text(
        f'{{"kind": "epoch", "step": 3, "epoch": 0, "test": {{"accuracy": {accuracy}}}}}\n'
    )


def test_the_summary_has_mean_and_deviation_of_the_finished_seeds(tmp_path: Path):
    a_run(tmp_path / "seed-0", status="finished", accuracy=0.5)
    a_run(tmp_path / "seed-1", status="finished", accuracy=0.7)
    a_run(tmp_path / "seed-2", status="stopped", accuracy=0.1)
    _, *runs, spread, left = summary(tmp_path).splitlines()
    assert [line.split()[0] for line in runs] == ["seed-0", "seed-1", "seed-2"]
    assert spread == "over 2 finished seeds: test accuracy 0.6000 ± 0.1414"
    assert left == "1 of 3 runs that have begun are not finished"
    with pytest.raises(InputError, match="no runs"):
        summary(tmp_path / "seed-0")


def test_the_summary_has_no_mean_over_different_settings(tmp_path: Path):
    for lr in ("0.1", "0.01"):
        a_run(tmp_path / f"optim.lr={lr}", status="finished", accuracy=0.5)
    assert [line.split()[0] for line in summary(tmp_path).splitlines()[1:]] == ["optim.lr=0.01", "optim.lr=0.1"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_launch_keeps_the_rules_of_the_house(path: Path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 250
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []
    if path.stem != "allocation":
        assert "os.environ[" not in text
        assert "environ.get" not in text
        assert "getenv" not in text
    if path.stem != "network":
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "torch" not in {(name.name if isinstance(node, ast.Import) else node.module).split(".")[0]
                               for node in top for name in node.names}  # fmt: skip


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [*map(str, (ROOT / "slurm").glob("*.sh")), str(ROOT / ".ci/run")]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == ""


def test_a_run_that_was_finished_before_is_extended(tmp_path: Path):
    """status.json says `finished` until the new attempt has begun: a job that is stopped before that must be requeued."""
    job = Allocation(job=7, nodes=1, cpus=1, gpus=0, ranks=1, array_task=None, restarts=0, max_requeues=3)
    (tmp_path / "status.json").write_text('{"status": "finished"}')
    (tmp_path / "attempts.jsonl").write_text('{"event": "finished", "step": 9, "token": "a"}\n')
    Journal(tmp_path, "7").begin()
    assert Journal(tmp_path, "7").end("USR1", job).verdict == "requeue"
