"""Starts the real commands as a user types them, watches them, and kills what it started by pid."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distributed.process.torchrun import torchrun_command
from distributed.run.metrics_file import MACHINE_METRICS
from kit.speed import slowness

ROOT = Path(__file__).parents[2]
_FREE_PORT = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
NARROW = ("--model.name", "fast_alexnet", "--model.widths", "[8, 16, 16]")
"""The arguments for a network that leaves most of the processors to other tests."""


def torchrun(
    ranks: int, *arguments: object, module: str = "distributed.train", options: Sequence[str] = _FREE_PORT
) -> list[str]:
    """Return `torchrun --nproc_per_node=RANKS OPTIONS -m MODULE ARGUMENTS`; by default, its rendezvous uses a free port."""
    return torchrun_command(ranks, module, [str(argument) for argument in arguments], options=options)


def alone(*arguments: object) -> list[str]:
    """Return `python -m distributed.train ARGUMENTS`: one process, without torchrun's."""
    return [sys.executable, "-m", "distributed.train", *map(str, arguments)]


def running(pid: int) -> bool:
    """Return whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Command:
    """A started command, its output in a file; leaving the context kills it and all of its descendants."""

    def __init__(
        self, arguments: Sequence[str], *, output: Path, cwd: Path = ROOT, more: Mapping[str, str] | None = None,
        **popen: Any,
    ) -> None:  # fmt: skip
        self.output = output
        self._seen: set[int] = set()
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                arguments, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **(more or {})}, **popen,
            )  # fmt: skip

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        kill(*self.ranks(), *self._seen, self.process.pid)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Pids of all processes below the command: under torchrun, the ranks."""
        found, below = [], [self.process.pid]
        while below:
            children = [child for pid in below for child in children_of(pid)]
            found += children
            below = children
        self._seen |= set(found)
        return found

    def wait(self, seconds: float = 120) -> int:
        """Return the exit code. Fails with the end of the output if the command is still running after `seconds`."""
        try:
            return self.process.wait(seconds * slowness())
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text[-4000:]}") from None

    def wait_for_ranks(self, seconds: float = 60) -> None:
        """Wait until all processes that were seen below the command have ended, also those that it left behind."""
        deadline = time.monotonic() + seconds * slowness()
        while left := [pid for pid in self._seen if running(pid)]:
            assert time.monotonic() < deadline, f"{left} still running after {seconds} s:\n{self.text[-4000:]}"
            time.sleep(0.02)

    def wait_for(
        self, condition: Callable[[], bool], *, seconds: float = 90, what: str = "condition", every: float = 0.02
    ) -> None:
        """Poll until the condition holds or the command has ended; a costly condition less often."""
        deadline = time.monotonic() + seconds * slowness()
        while not condition():
            if self.process.poll() is not None:
                return
            assert time.monotonic() < deadline, f"timed out after {seconds} s waiting for {what}:\n{self.text[-4000:]}"
            time.sleep(every)


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def kill(*pids: int, number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def attempts(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of attempts.jsonl with this event."""
    file = run / "attempts.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["event"] == event]


def status(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))


def has_saved(run: Path, *, attempt: int = 1) -> bool:
    """Whether this many attempts have started, and the last one has committed a checkpoint.

    The step in status.json does not tell: a checkpoint is written in the background.
    """
    started = attempts(run, "started")
    return len(started) >= attempt and status(run)["saved_step"] > started[-1]["step"]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """The tensors in the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*/tensors.safetensors"))[-1]
    return load_file(newest)


def assert_same_bits(run: Path, reference: Path) -> None:
    """Check that weights, buffers, optimizer state and logged losses are bit-identical to the reference run's."""
    assert (status(run)["status"], status(run)["step"]) == ("finished", status(reference)["step"])
    ours, theirs = final_tensors(run), final_tensors(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(run) == metrics(reference)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the values that depend on the clock or the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_METRICS} for line in lines]
