"""Step 4: checks that stopped and killed runs resume bit for bit, and evaluates a GPU checkpoint on the CPU."""

import json
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distributed.build import build_data, build_engine
from distributed.checkpoint.checkpointer import Checkpointer
from distributed.comm.process_group import choose_device
from distributed.config import from_command_line
from distributed.errors import ExitCode
from distributed.gpu_check import runs
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.processes import PYTHON, Process, Processes
from distributed.optim.schedules import build_schedule
from distributed.run.claim import ClaimedRun
from distributed.topology import Topology
from distributed.training.state import TrainState

_SECONDS = 44.0
_EXIT_CODES = {signal.SIGTERM: int(ExitCode.STOPPED), signal.SIGKILL: -int(signal.SIGKILL)}


@dataclass
class Interrupted:
    """A run that receives a signal once it has logged `at_step`, and is started again once it has ended."""

    run: Path
    command: list[str]
    signum: signal.Signals
    at_step: int
    first: Process
    sent: bool = False
    exit_code: int | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    """The newest checkpoint's state when the run was started again."""
    restarted: Process | None = None

    def advance(self, processes: Processes) -> bool:
        """Send the signal or start the run again once it is time. Return whether both are done."""
        if self.restarted is None:
            self.exit_code = self.first.popen.poll()
            if self.exit_code is not None:
                self.saved = runs.saved_state(self.run)
                self.restarted = processes.start(f"{self.run.name}-again", self.command)
            elif not self.sent and runs.step_logged(self.run) >= self.at_step:
                self.first.popen.send_signal(self.signum)
                self.sent = True
        return self.restarted is not None


def run(checks: Checks) -> None:
    modes: dict[str, dict[str, object]] = {"fast": {"exact__shards": 0}}
    if not checks.tiny:
        modes["exact"] = {"exact__shards": 8, "data__train_samples": 1610, "epochs": 5}
    with Processes(checks.scratch / "logs", seconds=_SECONDS) as processes:
        references = {
            mode: _start(checks, processes, f"{mode}-uninterrupted", settings) for mode, settings in modes.items()
        }
        interrupted = {
            (mode, signum): _interrupted(checks, processes, mode, settings, signum)
            for mode, settings in modes.items()
            for signum in _EXIT_CODES
        }
        deadline = time.monotonic() + 0.75 * _SECONDS
        pending = list(interrupted.values())
        while pending and time.monotonic() < deadline:
            pending = [one for one in pending if not one.advance(processes)]
            time.sleep(0.005)
        for mode, (reference, process) in references.items():
            with checks.check(f"{mode} mode: uninterrupted") as figures:
                process.succeed()
                runs.assert_finished(reference)
                figures["steps"], figures["last_loss"] = runs.step_logged(reference), runs.losses(reference)[-1]
        evaluations = _start_evaluations(checks, processes, references["fast"][0])
        for (mode, signum), one in interrupted.items():
            with checks.check(f"{mode} mode: {signum.name}, then resumed") as figures:
                _check_resumed(one, references[mode][0], figures)
        _check_evaluations(checks, evaluations, references["fast"][0])
    _save(checks)


def _command(checks: Checks, run: Path, settings: dict[str, object]) -> list[str]:
    sizes: dict[str, object] = {
        "data__train_samples": 4010, "data__test_samples": 4000, "global_batch_size": 64, "epochs": 8,
        "logging__every_steps": 5, "checkpoint__every_steps": 17,
    }  # fmt: skip
    if checks.tiny:
        sizes |= {
            "data__train_samples": 130, "data__test_samples": 50, "global_batch_size": 8, "epochs": 2, "threads": 1,
            "precision": "float32", "logging__every_steps": 1, "checkpoint__every_steps": 4,
        }  # fmt: skip
    return [*PYTHON, "distributed.train", *runs.arguments(run, checks.device, **(sizes | settings))]


def _start(checks: Checks, processes: Processes, name: str, settings: dict[str, object]) -> tuple[Path, Process]:
    run = checks.scratch / name
    return run, processes.start(name, _command(checks, run, settings))


def _interrupted(
    checks: Checks, processes: Processes, mode: str, settings: dict[str, object], signum: signal.Signals
) -> Interrupted:
    run = checks.scratch / f"{mode}-{signum.name}"
    command = _command(checks, run, settings)
    # In the middle of an epoch, which has 13 steps if tiny, 21 in exact mode, else 51.
    early, late = (5, 18) if checks.tiny else (30, 50) if mode == "exact" else (75, 130)
    at_step = early if signum == signal.SIGTERM else late
    return Interrupted(run, command, signum, at_step, processes.start(run.name, command))


def _check_resumed(one: Interrupted, reference: Path, figures: dict[str, Any]) -> None:
    assert one.sent, f"{one.run.name} ended with {one.exit_code} before step {one.at_step}\n{one.first.text[-1500:]}"
    assert one.exit_code == _EXIT_CODES[one.signum], f"exit code {one.exit_code}\n{one.first.text[-1500:]}"
    figures["resumed_at_step"], figures["resumed_at_step_in_epoch"] = (
        one.saved.get("step"),
        one.saved.get("step_in_epoch"),
    )
    assert one.restarted is not None
    one.restarted.succeed()
    assert 0 < figures["resumed_at_step"] < runs.saved_state(reference)["step"], (
        "the signal arrived too late or too early"
    )
    figures["tensors"] = runs.assert_same_bits(one.run, reference)


def _start_evaluations(checks: Checks, processes: Processes, run: Path) -> dict[str, Process]:
    def start(name: str, *device: str, environment: dict[str, object] | None = None) -> Process:
        picture = checks.scratch / f"{name}.png"
        options = ["--checkpoint", "latest", "--json", "--confusion", picture, *device]
        return processes.start(
            f"evaluate-{name}", [*PYTHON, "distributed.evaluate", run, *options], environment=environment
        )

    found = {"cpu": start("cpu", "--device", "cpu", environment={"CUDA_VISIBLE_DEVICES": ""})}
    return found | ({"cuda": start("cuda")} if checks.is_cuda else {})


def _check_evaluations(checks: Checks, evaluations: dict[str, Process], run: Path) -> None:
    """Compare with the figures of the run's last epoch: equal on the same device, nearly equal accuracy on another."""
    for name, process in evaluations.items():
        with checks.check(f"the run evaluated on {name}") as figures:
            lines = process.succeed().splitlines()
            found = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
            in_training = [line for line in runs.logged(run) if line["kind"] == "epoch"][-1]["test"]
            figures |= {key: found[key] for key in ("images", "loss", "top1")}
            figures["correct images relative to training"] = round(
                (found["top1"] - in_training["accuracy"]) * found["images"]
            )
            if name == checks.device.type:
                assert (found["loss"], found["top1"]) == (in_training["loss"], in_training["accuracy"]), in_training
            assert abs(found["top1"] - in_training["accuracy"]) <= 0.002, in_training


def _save(checks: Checks) -> None:
    """Time a save: how long the training loop waits, and how long writing takes in the background."""
    name = "improved_alexnet" if checks.tiny else "cifar_alexnet"
    with checks.check(f"a save of {name}") as figures:
        settings = partial(runs.arguments, checks.scratch / "saves", checks.device, model__name=name)
        config = from_command_line(settings(data__train_samples=1000, data__test_samples=100, exact__shards=0)).config
        device = choose_device(checks.device.type, Topology())
        data = build_data(config, Topology(), device)
        engine = build_engine(config, Topology(), data, device)
        state = TrainState(build_schedule(config, steps_per_epoch=data.steps_per_epoch))
        folder = ClaimedRun.claim(config.run_dir, world_size=1)
        saver = Checkpointer(folder.checkpoints, folder, keep_last=2, metadata={})
        for state.step in (1, 2):  # the second save counts: the first allocates memory
            checks.synchronize()
            start = time.perf_counter()
            saver.save(engine, state)
            figures["waited_seconds"] = time.perf_counter() - start
            saver.wait()
            figures["seconds"] = time.perf_counter() - start
        figures["bytes"] = sum(tensor.nbytes for _, tensor in engine.state())
        start = time.perf_counter()
        saver.resume(engine, state)
        checks.synchronize()
        figures["restored_seconds"] = time.perf_counter() - start
        assert runs.saved_digests(config.run_dir).keys() == {name for name, _ in engine.state()}
        folder.release()
