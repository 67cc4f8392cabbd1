"""Step 8: measures training speed by network, batch size and mode, counts kernel launches and profiles.

After every check all figures are also written to gpu_speed.json. The profiler's tables go to profile.txt.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from distributed.comm.process_group import choose_device
from distributed.config import from_command_line
from distributed.files import replace_json
from distributed.gpu_check import runs
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.graphs import captured
from distributed.gpu_check.step_profile import profile
from distributed.gpu_check.timed_steps import ComputeAlone, Training
from distributed.gpu_check.timing import host_seconds
from distributed.host.versions import versions
from distributed.process import logs
from distributed.recipe import train
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic

_SIZES = (
    ("improved_alexnet", 128), ("improved_alexnet", 512), ("improved_alexnet", 2048), ("cifar_alexnet", 128),
    ("alexnet", 128),
)  # fmt: skip
_DETERMINISM = (("improved_alexnet", 128), ("improved_alexnet", 2048), ("cifar_alexnet", 128))
"""Networks and batch sizes for which the cost of deterministic kernels is measured."""


@dataclass
class Speed:
    """The checks of this step, whose figures also go to one file."""

    checks: Checks
    device: torch.device
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of timed blocks, and steps per block."""
        return (1, 2) if self.checks.tiny else (6, 10)

    @property
    def warm_up(self) -> int:
        """Number of steps before the timed ones."""
        return 0 if self.checks.tiny else 5

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Run `Checks.check`, then rewrite the file."""
        with self.checks.check(name) as figures:
            yield figures
        self.found[name] = figures
        card = torch.cuda.get_device_name(self.device) if self.checks.is_cuda else "cpu"
        metadata = {"card": card, "versions": versions(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        replace_json(self.checks.out / "gpu_speed.json", metadata | {"tiny": self.checks.tiny, "figures": self.found})

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Return milliseconds per call, the mean over blocks: one step in many augments the images of all."""
        for _ in range(self.warm_up):
            call()
        repeats, calls = self.blocks
        return host_seconds(call, self.checks, repeats=repeats, calls=calls) * 1000

    def training(self, model: str, batch: int, *, capture: bool = False, **settings: object) -> Training:
        """Return training steps of the engine these settings select, in epochs of at least twelve full batches."""
        batches = 3 if self.checks.tiny else max(12, 6144 // batch)
        return Training(self.device, model, batch, batches=batches, capture=capture, **settings)


def run(checks: Checks) -> None:
    logs.terminal_logs(0, level="WARNING")
    speed = Speed(checks, choose_device(checks.device.type, Topology()))
    sizes = [("improved_alexnet", 16)] if checks.tiny else list(_SIZES)
    model, batch = sizes[0]
    _recipe(speed, model, batch)
    make_deterministic(speed.device, precision="bfloat16")  # the recipe restores torch's settings
    for name, size in sizes:
        _training(speed, f"{name}, batch {size}", name, size)
    (checks.out / "profile.txt").unlink(missing_ok=True)
    for name, size in dict.fromkeys([(model, batch), sizes[-2 % len(sizes)]]):
        _profile(speed, name, size)
    _modes(speed, model, batch)
    for name, size in sizes:
        _compute_alone(speed, name, size)
    if checks.is_cuda:
        # Last: compilation takes long.
        make_deterministic(speed.device, precision="bfloat16", compile=True)
        _training(speed, f"compiled, {model}, batch {batch}", model, batch, compile="true")


def _recipe(speed: Speed, model: str, batch: int) -> None:
    """Time the complete loop as `python -m distributed.train` runs it, logging included."""
    with speed.check(f"the recipe, {model}, batch {batch}") as figures:
        steps = 4 if speed.checks.tiny else 400
        settings: dict[str, object] = {
            "model__name": model, "global_batch_size": batch, "data__train_samples": 2 * steps // 4 * batch,
            "data__test_samples": 10, "data__validation_fraction": 0, "epochs": 2, "exact__shards": 0,
            "threads": int(speed.checks.tiny),
        }  # fmt: skip
        clock = _Clock(last=steps // 2 - 1)
        config = from_command_line(runs.arguments(speed.checks.scratch / "recipe", speed.device, **settings)).config
        train(config, stop=clock)
        first = len(clock.times) // 5
        seconds = (clock.times[-1] - clock.times[first]) / (len(clock.times) - 1 - first)
        figures |= {"ms_per_step": seconds * 1000, "images_per_second": batch / seconds}


class _Clock:
    """A stop source that reads the clock, since the loop queries it after every step. It stops the run before an epoch ends."""

    def __init__(self, *, last: int) -> None:
        self.times, self._last = list[float](), last

    def requested(self) -> str | None:
        self.times.append(time.perf_counter())
        return "the end of the measurement" if len(self.times) >= self._last else None


def _training(speed: Speed, name: str, model: str, batch: int, **settings: Any) -> None:
    """Time eager steps and, on CUDA, steps replayed as a graph, which must have the same bits."""
    with speed.check(name) as figures:
        eager = speed.training(model, batch, **settings)
        _time(speed, figures, "eager", eager, batch)
        figures["ms_data_alone"] = speed.milliseconds(eager.next_micro_batches)
        if speed.checks.is_cuda:
            captured_run = speed.training(model, batch, capture=True, **settings)
            _time(speed, figures, "captured", captured_run, batch)
            figures["memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            before = dict(eager.engine.state())
            different = [n for n, tensor in captured_run.engine.state() if not torch.equal(tensor, before[n])]
            assert not different, (
                f"{len(different)} of {len(before)} tensors differ in the captured run: {different[:3]}"
            )


def _time(speed: Speed, figures: dict[str, Any], mode: str, training: Training, batch: int) -> None:
    ms = speed.milliseconds(training.step)
    figures |= {
        f"ms_{mode}": ms,
        f"images_per_second_{mode}": batch / ms * 1000,
        "mean_loss": training.checked_mean_loss(),
    }


def _modes(speed: Speed, model: str, batch: int) -> None:
    """Time the cost of settings: exact mode, images in host memory, CutMix."""
    modes: dict[str, dict[str, object]] = {
        "exact mode, 1 shard": {"exact__shards": 1}, "exact mode, 8 shards": {"exact__shards": 8},
        "images in host memory": {"data__placement": "host"}, "cutmix": {"data__augment__cutmix": 1.0},
    }  # fmt: skip
    for name, settings in modes.items():
        _training(speed, f"{name}, {model}, batch {batch}", model, batch, **settings)


def _profile(speed: Speed, model: str, batch: int) -> None:
    with speed.check(f"profile of {model}, batch {batch}") as figures:
        training = speed.training(model, batch, capture=False)
        steps = 2 if speed.checks.tiny else 20
        for _ in range(speed.warm_up):
            training.step()
        figures |= profile(
            training.step,
            speed.checks,
            steps=steps,
            title=f"{model}, batch {batch}",
            file=speed.checks.out / "profile.txt",
        )
        if speed.checks.is_cuda:
            assert figures["kernel_launches_per_step"] > 0


def _compute_alone(speed: Speed, model: str, batch: int) -> None:
    """Time compute alone, eager and in a graph, and the cost of deterministic kernels."""
    flags = torch.backends.cudnn
    before = flags.deterministic, flags.benchmark
    for kind, deterministic, benchmark in (
        ("deterministic", True, False), ("any kernels", False, False), ("any kernels, benchmarked", False, True),
    ):  # fmt: skip
        if kind != "deterministic" and (model, batch) not in _DETERMINISM:
            continue
        with speed.check(f"compute alone, {kind}, {model}, batch {batch}") as figures:
            flags.deterministic, flags.benchmark = deterministic, benchmark
            try:
                alone = ComputeAlone(speed.device, model, batch)
                figures["ms_eager"] = speed.milliseconds(alone.step)
                figures["images_per_second_eager"] = batch / figures["ms_eager"] * 1000
                if speed.checks.is_cuda:
                    figures |= _replayed(speed, alone)
            finally:
                flags.deterministic, flags.benchmark = before
            assert math.isfinite(float(alone.loss))


def _replayed(speed: Speed, alone: ComputeAlone) -> dict[str, float]:
    """Return the time and speed of replayed steps, after checking that a replay changes the weights."""
    graph = captured(alone.step)
    # Not biases: batch norm cancels the biases before it, so their gradients are only rounding errors.
    weights = [p for p in alone.optimizer.parameters if p.dim() > 1]
    before = [p.detach().clone() for p in weights]
    graph.replay()
    unchanged = sum(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert not unchanged, f"a replay left {unchanged} of {len(weights)} weights unchanged"
    ms = speed.milliseconds(graph.replay)
    return {"ms_in_a_graph": ms, "images_per_second_in_a_graph": alone.images.shape[0] / ms * 1000}
