"""Training steps for the step `networks`: repeatable, and observed for synchronizations and nondeterminism."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed.build import build_data, build_engine
from distributed.config import TrainConfig, from_command_line
from distributed.config.engines import Ddp
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline
from distributed.engine.ddp import DdpEngine
from distributed.engine.prepare import Compute
from distributed.engine.protocol import Engine
from distributed.models import alexnet
from distributed.models.convert_dropout import convert_dropout
from distributed.models.fast_alexnet import FastAlexNet
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.step_function import build_step
from distributed.training.totals import TotalsAccumulator

STEPS = 2
_LR = {"sgd": 0.02, "adamw": 1e-3}


def config_of(network: str, precision: str, batch: int, *options: str, shards: int = 0) -> TrainConfig:
    """Return the config of a run on generated images in device memory, a few steps per epoch; exact mode if `shards` > 0."""
    return from_command_line(
        [
            "--data.name", "generated10", "--data.train_samples", str(max(10, 4 * batch)), "--data.test_samples", "10",
            "--data.validation_fraction", "0", "--data.placement", "device", "--global_batch_size", str(batch),
            "--model.name", network, "--precision", precision, "--exact.shards", str(shards), *options,
        ]
    ).config  # fmt: skip


@dataclass(frozen=True)
class Trajectory:
    """The loss and gradient norm of some steps, and every tensor of the engine after the last."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor]


class DeterministicTrajectory(NamedTuple):
    """A trajectory in torch's deterministic mode, and the operations that it reports as nondeterministic."""

    trajectory: Trajectory
    nondeterministic: list[str]


class Run:
    """An engine that can repeat the same steps from the same weights.

    Args:
        model: float32 on the CPU, copied; None: the config's network and initial weights, which takes 20 s for alexnet.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        data: DataPipeline | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.data = data or build_data(config, Topology(), device)
        self.engine = self._engine(model)
        self._start = copied(self.engine)

    def _engine(self, model: nn.Module | None) -> Engine:
        if model is None:
            return build_engine(self.config, Topology(), self.data, self.device)
        config = self.config
        compute = Compute(config.precision, config.channels_last, self.device, config.timeout_seconds)
        model, example = copy.deepcopy(model), self.data.example()
        return DdpEngine(Ddp(), model, optim=config.optim, compute=compute, example=example, compile=config.compile)

    def warm_up(self, steps: int) -> None:
        """Take throwaway steps. Afterwards float16's loss scale is so small that no step will be skipped."""
        self.trajectory(count=steps)
        scale = {name: tensor.clone() for name, tensor in self.engine.state() if name == "scaler.scale"}
        self._start |= {name: tensor / 16 for name, tensor in scale.items()}

    def trajectory(self, count: int = STEPS) -> Trajectory:
        """Take the first `count` steps of an epoch from the initial weights. Reads nothing from the device before the end."""
        self.engine.load_state(self._start)
        totals = [TotalsAccumulator(self.device) for _ in range(count)]
        norms = []
        for step, batches in enumerate(islice(self.data.train_epoch(0), count)):
            norms.append(self._step(batches, step, totals[step]))
        losses = [of_step.read().mean_loss for of_step in totals]
        return Trajectory(losses, [float(norm) for norm in norms], copied(self.engine))

    def waits(self) -> list[str]:
        """Return each line of code at which the host waited for the device during steps; none on a CPU."""
        self.engine.load_state(self._start)
        totals = TotalsAccumulator(self.device)
        batches = self.data.train_epoch(0)
        with _waits(self.device) as lines:
            for step, micro_batches in enumerate(islice(batches, STEPS)):
                self._step(micro_batches, step, totals)
        return lines

    def _step(self, micro_batches: list[Batch], step: int, totals: TotalsAccumulator) -> Tensor:
        """Take one step as a run on this device does, but not captured."""
        config = self.config.model_copy(update={"cuda_graphs": False})
        lr = _LR[config.optim.name]
        loss = build_losses(config.loss).training
        return build_step(config, self.engine, totals, self.device, loss)(micro_batches, lr=lr, step=step).clone()

    def deterministic_trajectory(self) -> DeterministicTrajectory:
        """Take steps in torch's deterministic mode."""
        with _nondeterministic() as operations:
            trajectory = self.trajectory()
        return DeterministicTrajectory(trajectory, operations)


def copied(engine: Engine) -> dict[str, Tensor]:
    """Return copies of all tensors of the training state."""
    return {name: tensor.detach().clone() for name, tensor in engine.state()}


def initial_model(network: str) -> nn.Module:
    """Return the network with torch's random weights from a fixed seed, which are faster to create than the project's."""
    torch.manual_seed(0)
    if network == "fast_alexnet":
        return FastAlexNet(10, widths=(64, 256, 256), whitening=True, activation="relu")
    return convert_dropout(getattr(alexnet, network)(10, 0.5))


@contextmanager
def _waits(device: torch.device) -> Iterator[list[str]]:
    """Collect each line at which the host waits for the device. torch's error mode would name only the first."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    lines += _lines(caught, "synchronizing CUDA operation")


@contextmanager
def _nondeterministic() -> Iterator[list[str]]:
    """Use deterministic implementations, and collect the operations that have none."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports inductor, for seconds
        try:
            yield found
        finally:
            torch.set_deterministic_debug_mode("default")
    messages = [str(warning.message) for warning in caught]
    found += sorted({message[:160] for message in messages if "deterministic" in message})


def _lines(caught: list[warnings.WarningMessage], phrase: str) -> list[str]:
    found: Mapping[str, None] = {
        f"{Path(warning.filename).parent.name}/{Path(warning.filename).name}:{warning.lineno}": None
        for warning in caught
        if phrase in str(warning.message)
    }
    return list(found)
