"""Runs in one process, one after another: they leave no thread, file, memory or process group behind. `train` on two ranks."""

import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from kit.ranks import run_ranks
from kit.small_runs import FAST, Recorder, small_config
from torch import Tensor, nn

from distributed import EpochMetrics, TrainMetrics
from distributed.errors import InputError
from distributed.recipe import train

RUNS = 20  # the allocator takes more memory in some of the first fifteen, most with FSDP
MIB_PER_RUN = 1.0  # the network has 3.5 MiB of weights
ENGINES: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"exact": FAST},
    "fsdp": {"exact": FAST, "engine": {"name": "fsdp"}},
}


class Left(NamedTuple):
    """What a process has after a run."""

    threads: list[str]
    files: list[str]
    has_group: bool
    torch_threads: int
    mib: float


def left() -> Left:
    return Left(
        sorted(thread.name for thread in threading.enumerate()),
        sorted(kind(Path("/proc/self/fd", name)) for name in os.listdir("/proc/self/fd")),
        dist.is_initialized(),
        torch.get_num_threads(),
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
    )


def kind(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor).partition(":")[0]
    except FileNotFoundError:  # the one that lists the folder
        return ""


def once_settled(measure: Callable[[], Left], threads: list[str]) -> Left:
    """Measure once the threads that are ending have ended."""
    deadline = time.monotonic() + 10
    while (found := measure()).threads != threads and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def many_runs(folder: Path, settings: dict[str, Any], count: int) -> list[Left]:
    before = left()
    found = []
    for run in range(count):
        few = {"train_samples": 16, "test_samples": 10}
        train(small_config(folder / str(run), epochs=1, global_batch_size=8, data=few, **settings))
        found.append(once_settled(left, before.threads))
    return [before, *found]


def assert_nothing_is_left(found: list[Left]) -> None:
    before, *after = found
    settled = len(after) // 2
    assert [run.threads for run in after] == [before.threads] * len(after)
    # Gloo closes sockets a moment later; matplotlib's fonts and torch's own files stay.
    assert len(after[-1].files) <= len(after[settled - 1].files) + 2, after[-1].files
    assert len(after[-1].files) <= len(before.files) + 8, after[-1].files
    assert not any(run.has_group for run in after)
    assert {run.torch_threads for run in after} == {before.torch_threads}
    # A leak grows in every run.
    growth = median(later.mib - run.mib for run, later in pairwise(after[settled - 1 :]))
    assert growth < MIB_PER_RUN, " ".join(f"{run.mib:.1f}" for run in after)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("engine", ENGINES)
def test_many_runs_on_two_ranks_leave_nothing(engine: str, tmp_path: Path) -> None:
    for found in run_ranks(many_runs, 2, tmp_path, ENGINES[engine], RUNS, timeout_seconds=150):
        assert_nothing_is_left(found)


def alone(folder: Path) -> list[Left]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    return many_runs(folder, {"threads": 2}, RUNS)


@pytest.mark.timeout(200)
def test_many_runs_of_one_process_leave_nothing(tmp_path: Path) -> None:
    [found] = run_ranks(alone, 1, tmp_path, timeout_seconds=150)
    assert_nothing_is_left(found)


class Net(nn.Module):
    __module__ = "__main__"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return out


class OnMain:
    """A sink without `on_every_rank`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log_step(self, metrics: TrainMetrics) -> None:
        self.calls.append("step")

    def log_epoch(self, metrics: EpochMetrics) -> None:
        self.calls.append("epoch")

    def close(self) -> None:
        self.calls.append("close")


class RankResult(NamedTuple):
    """What a rank gets from `train`."""

    main_calls: list[str]
    losses: list[float]
    history: list[float | None]
    weights: dict[str, Tensor]


def result_of(folder: Path, settings: dict[str, Any], given: str) -> RankResult:
    torch.manual_seed(3)
    on_main, on_all = OnMain(), Recorder()
    model = Net(10) if given == "module" else Net
    config = small_config(folder, data={"train_samples": 48}, **settings)
    result = train(config, model=model, sinks=[on_main, on_all])
    losses = [epoch.train_loss for epoch in on_all.epochs]
    return RankResult(on_main.calls, losses, [e.train_loss for e in result.history], result.network.state_dict())


@pytest.mark.parametrize(("engine", "given"), [("exact", "module"), ("exact", "class"), ("fsdp", "module")])
def test_every_rank_gets_network_and_history(engine: str, given: str, tmp_path: Path) -> None:
    first, second = run_ranks(result_of, 2, tmp_path / "two", ENGINES[engine], given)
    assert first.main_calls == ["step", "step", "epoch"] * 2 + ["close"]
    assert second.main_calls == []
    assert first.losses == second.losses == first.history == second.history
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in second.weights.items())
    if engine == "exact":
        [alone] = run_ranks(result_of, 1, tmp_path / "one", ENGINES[engine], given)
        assert alone.losses == first.losses
        assert all(torch.equal(alone.weights[name], tensor) for name, tensor in first.weights.items())


def refusal(folder: Path, differs: str) -> str:
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank if differs == "weights" else 0)
    named = type(f"Net{rank}", (Net,), {"__module__": "__main__"})
    try:
        train(small_config(folder), model=named if differs == "name" else Net(10))
    except InputError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("differs", "message", "remedy"),
    [
        (
            "weights",
            "model.name = __main__:Net: rank 1 built a different network from rank 0 (conv.weight differs)",
            "call torch.manual_seed before a module is built",
        ),
        ("name", "config: rank 1 has different settings from rank 0", "start every node with the same command"),
    ],
)
def test_ranks_with_other_objects_are_named(differs: str, message: str, remedy: str, tmp_path: Path) -> None:
    for found in run_ranks(refusal, 2, tmp_path / "run", differs):
        assert found.startswith(message)
        assert remedy in found
