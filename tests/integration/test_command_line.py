"""The command line as users type it, right and wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kit.abuse import assert_outcome, call
from kit.commands import ROOT, Command, attempts, final_tensors, kill, metrics, status, torchrun
from kit.slow_sink import SLOW
from kit.speed import slowness

CPU = ("--device", "cpu")
SMALL = ("configs/debug.toml", *CPU, "--data.train_samples", "200", "--data.test_samples", "40")
TINY = (*SMALL, "--epochs", "1")
HEAVY = {"torch", "ray", "deepspeed", "matplotlib"}


def python(*arguments: object, module: str = "distributed.train") -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(arguments: list[str], cwd: Path = ROOT, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds * slowness(), check=False
    )


def run_listing_imports(*arguments: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run distributed.train; also return the names of the modules that it imported."""
    result = run([sys.executable, "-X", "importtime", *python(*arguments)[1:]])
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return result, {line.split("|")[2].strip() for line in lines}


def test_all_errors_are_reported_before_importing_torch(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('epochs = 3\n\n[optim]\nlrr = 0.05\n\n[data]\nname = "generated10"\n')
    result, imported = run_listing_imports(config, "--precision", "fp4", *CPU)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if not line.startswith("import time:")] == [
        "error: command line: precision = fp4: should be 'auto', 'float32', 'tf32', 'bfloat16', 'float16' or 'float64'",
        f"error: {config}:4: optim.lrr = 0.05: unknown setting; did you mean optim.lr?",
    ]
    assert not HEAVY & imported


def test_torchrun_prints_an_error_last_above_its_banner(tmp_path: Path) -> None:
    result = run(torchrun(2, "configs/debug.toml", "--optim.lrr", "1", *CPU, "--run_dir", tmp_path / "run"))
    lines = result.stderr.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert [lines[number] for number in errors] == [
        "error: command line: optim.lrr = 1: unknown setting; did you mean optim.lr?"
    ]
    assert "Traceback" not in "\n".join(lines[: errors[0]])
    assert "torch/distributed/elastic" in lines[errors[0] + 1]  # torchrun's own output from here on
    assert "failed (exitcode: 2)" in result.stderr
    assert not (tmp_path / "run").exists()


def test_missing_data_is_named_with_the_remedy(tmp_path: Path) -> None:
    result = run(python("configs/cifar10.toml", *CPU, "--data.root", tmp_path, "--run_dir", tmp_path / "run"))
    assert result.returncode == 2
    assert f"{tmp_path}/cifar-10-batches-bin/data_batch_1.bin: No such file" in result.stderr
    assert "--data.root" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_imports_no_torch() -> None:
    result, imported = run_listing_imports("--help")
    assert result.returncode == 0
    assert "distributed.config" in imported
    assert not HEAVY & imported
    for option in ("--optim.lr ", "--schedule.patience", "--data.augment.crop", "--checkpoint.every_minutes"):
        assert option in result.stdout


def shell(command: list[str], redirection: str) -> subprocess.CompletedProcess[str]:
    """Run the command in bash, followed by redirections or a pipe."""
    return run(["bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash", *command])


def test_help_piped_to_head_prints_no_error() -> None:
    result = shell(python("--help"), "| head -n 1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage:")


@pytest.mark.parametrize("module", ["train", "compare"])
def test_a_closed_terminal_changes_no_exit_code(module: str, tmp_path: Path) -> None:
    wrong = {"train": [*CPU, "--nonsense"]}
    arguments = wrong.get(module, [tmp_path / "none", tmp_path])
    assert shell(python(*arguments, module=f"distributed.{module}"), ">&- 2>&-").returncode == 2


@pytest.mark.timeout(200)
@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | head -n 1"])
def test_a_run_outlives_its_terminal(redirection: str, tmp_path: Path) -> None:
    folder = tmp_path / "{x} {time} <red> %s"
    result = shell(python(*TINY, "--run_dir", folder, "--logging.tensorboard", "false"), redirection)
    assert (result.returncode, result.stderr) == (0, "")
    assert status(folder)["status"] == "finished"
    assert "epoch 1/1 done" in (folder / "logs" / "rank-0000.log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.smoke
@pytest.mark.timeout(200)
def test_generated_images_are_announced_and_marked(tmp_path: Path) -> None:
    """The fallback has 50,000 images, so the run is stopped after a step."""
    settings = (*CPU, "--epochs", 1, "--logging.every_steps", 1)
    with Command(python(*settings), output=tmp_path / "output", cwd=tmp_path) as command:
        command.wait_for(lambda: "step 1/" in command.text, what="step 1")
        kill(command.process.pid, number=signal.SIGTERM)
        command.wait(60)
    folder = tmp_path / "runs" / "improved_alexnet-generated10"
    assert "NO CIFAR-10 IN" in command.text
    assert {line["data"] for line in metrics(folder)} == {"generated10"}
    state = json.loads((folder / "checkpoints" / "latest" / "state.json").read_text())
    assert state["data"] == "generated10"
    assert list((folder / "tensorboard").glob("events*"))
    assert status(folder)["status"] == "stopped"


@pytest.mark.smoke
@pytest.mark.timeout(200)
def test_a_finished_run_says_so_and_refuses_changes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(python(*TINY, "--logging.curves", "true", "--run_dir", folder)).returncode == 0
    assert (folder / "curves.png").stat().st_size > 10_000
    again = run(python(*TINY, "--run_dir", folder))
    assert (again.returncode, "this run is finished" in again.stderr) == (0, True)
    from_resolved = run(python(folder / "config.toml"))
    assert (from_resolved.returncode, "this run is finished" in from_resolved.stderr) == (0, True)
    changed = run(python(*TINY, "--run_dir", folder, "--optim.lr", "0.05", "--seed", "1"))
    assert changed.returncode == 2
    assert "optim.lr = 0.05: this run was started with 0.1" in changed.stderr
    assert "seed = 1: this run was started with 0" in changed.stderr
    evaluated = run(python(folder, "--split", "test", module="distributed.evaluate"))
    test = metrics(folder)[-1]["test"]
    assert f"loss {test['loss']:.4f}, top-1 {test['accuracy']:.2%}, top-5 {test['accuracy5']:.2%}" in evaluated.stdout


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_outcome(call("train", *TINY, "--run_dir", tmp_path / "file" / "run"), f"{tmp_path / 'file'} is not a folder")


@pytest.mark.timeout(200)
def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = python(*SMALL, *SLOW, "--logging.every_steps", 1, "--epochs", 5000, "--run_dir", folder)
    with Command(first, output=tmp_path / "first") as running:
        running.wait_for(lambda: attempts(folder, "started"), what="the start")
        second = run(python(*SMALL, "--epochs", 5000, "--run_dir", folder), seconds=90)
        assert second.returncode == 2
        assert f"another run is writing there (process {running.process.pid}" in second.stderr
        assert running.process.poll() is None


@pytest.mark.timeout(200)
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert call("train", *TINY, "--schedule.name", "constant", "--run_dir", folder).code == 0
    before = final_tensors(folder)
    longer = python(*SMALL, "--schedule.name", "constant", "--run_dir", folder, "--epochs", 3)

    def no_large_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    with Command(longer, output=tmp_path / "output", preexec_fn=no_large_files) as command:
        assert command.wait() == 4, command.text
    errors = [line for line in command.text.splitlines() if "ERROR" in line]
    assert len(errors) == 1
    assert "checkpoint not written: File too large" in errors[0]
    assert "Traceback" not in command.text
    assert status(folder)["exit_code"] == 4
    assert all((final_tensors(folder)[name] == tensor).all() for name, tensor in before.items())
    assert run(longer).returncode == 0


@pytest.mark.timeout(200)
def test_an_interrupt_saves(tmp_path: Path) -> None:
    settings = ("configs/debug.toml", *CPU, "--epochs", 200, "--run_dir", tmp_path / "run")
    with Command(python(*settings), output=tmp_path / "once") as command:
        command.wait_for(lambda: "step 10/" in command.text, what="step 10")
        command.process.send_signal(signal.SIGINT)
        assert command.wait(60) == 75
    stopped = status(tmp_path / "run")
    assert (stopped["status"], stopped["reason"]) == ("stopped", "SIGINT")


@pytest.mark.timeout(200)
def test_a_loss_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = (*SMALL, "--optim.lr", 100, "--run_dir", folder, "--checkpoint.every_steps", 1, "--epochs", 9)
    assert_outcome(call("train", *arguments), "the loss was not finite at step", code=3)
    assert all(tensor.isfinite().all() for tensor in final_tensors(folder).values())


@pytest.mark.timeout(200)
def test_a_plain_run_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv[1:] = sys.argv[1:]\n"
        "import distributed.train, distributed.run_process\n"
        "from distributed.config import from_command_line; from distributed.recipe import train\n"
        "class AtOnce:\n    def requested(self): return 'the test'\n"
        "train(from_command_line(sys.argv[1:]).config, stop=AtOnce())\n"
        "print([m for m in ('ray', 'deepspeed', 'tensorboard', 'matplotlib', 'torchvision') if m in sys.modules])"
    )
    result = run([sys.executable, "-c", program, *TINY, "--run_dir", str(tmp_path / "run")])
    assert result.stdout.strip() == "[]", result.stderr
