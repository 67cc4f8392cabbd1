"""Training steps for step `networks`: engines, repeated steps, detection of synchronizations."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed.build import build_data, build_engine, build_step
from distributed.config import TrainConfig, from_command_line
from distributed.config.engines import Ddp
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline
from distributed.engine.ddp import DdpEngine
from distributed.engine.protocol import Engine
from distributed.models import alexnet
from distributed.topology import Topology
from distributed.training.totals import MetricAccumulator

STEPS = 2
_LR = {"sgd": 0.02, "adamw": 1e-3}


def config_of(network: str, precision: str, batch: int, *options: str, shards: int = 0) -> TrainConfig:
    """A run, in exact mode if there are shards, on generated images that are on the device, with a few steps an epoch."""
    return from_command_line(
        [
            "--data.name", "generated10", "--data.train_samples", str(max(10, 4 * batch)), "--data.test_samples", "10",
            "--data.validation_fraction", "0", "--data.placement", "device", "--global_batch_size", str(batch),
            "--model.name", network, "--precision", precision, "--exact.shards", str(shards), *options,
        ]
    ).config  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """The loss and the gradient's norm of each step, and every tensor of the engine after the last."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor]


class Run:
    """An engine that can take the same steps from the same weights again.

    Args:
        model: float32 on the CPU, copied; none: the config's network with its keyed weights, which take 20 s for alexnet.
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
        return DdpEngine(
            Ddp(), copy.deepcopy(model), optim=config.optim, precision=config.precision,
            channels_last=config.channels_last, device=self.device, example=self.data.example(),
            timeout_seconds=config.timeout_seconds, compile=config.compile,
        )  # fmt: skip

    def warm_up(self, steps: int) -> None:
        """Take throwaway steps. Afterwards float16's scale of the loss is so small that no step will be skipped."""
        self.steps(count=steps)
        scale = {name: tensor.clone() for name, tensor in self.engine.state() if name == "scaler.scale"}
        self._start |= {name: tensor / 16 for name, tensor in scale.items()}

    def steps(self, count: int = STEPS) -> Steps:
        """Take the first steps of an epoch from the first weights, images and totals included; read nothing before the end."""
        self.engine.load_state(self._start)
        sums = [MetricAccumulator(self.device) for _ in range(count)]
        norms = []
        for step, batches in enumerate(islice(self.data.train_epoch(0), count)):
            norms.append(self._take(batches, step, sums[step]))
        return Steps([one.read().mean_loss for one in sums], [float(norm) for norm in norms], copied(self.engine))

    def waits(self) -> list[str]:
        """Each line of code at which the host waited for the device in a step; none on a CPU."""
        self.engine.load_state(self._start)
        sums = MetricAccumulator(self.device)
        batches = self.data.train_epoch(0)
        with _waits(self.device) as lines:
            for step, micro_batches in enumerate(islice(batches, STEPS)):
                self._take(micro_batches, step, sums)
        return lines

    def _take(self, micro_batches: list[Batch], step: int, sums: MetricAccumulator) -> Tensor:
        """One step as in a run on this device, but not captured."""
        config = self.config.model_copy(update={"cuda_graphs": False})
        lr = _LR[config.optim.name]
        return build_step(config, self.engine, sums, self.device)(micro_batches, lr=lr, step=step).clone()

    def nondeterministic(self) -> tuple[list[str], Steps]:
        """Operations that torch reports as nondeterministic; and the steps in its deterministic mode."""
        with _nondeterministic() as operations:
            steps = self.steps()
        return operations, steps


def copied(engine: Engine) -> dict[str, Tensor]:
    """Copies of all tensors of the training state."""
    return {name: tensor.detach().clone() for name, tensor in engine.state()}


def initial_model(network: str) -> nn.Module:
    """The network with torch's random weights, always the same ones, which are made faster than keyed ones."""
    torch.manual_seed(0)
    model: nn.Module = getattr(alexnet, network)(10, 0.5)
    return model


@contextmanager
def _waits(device: torch.device) -> Iterator[list[str]]:
    """Lists each line at which the host waits for the device. Torch's error mode would name the first one only."""
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
    lines += _places(caught, "synchronizing CUDA operation")


@contextmanager
def _nondeterministic() -> Iterator[list[str]]:
    """Lists each operation that has no deterministic implementation; those that have one use it."""
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


def _places(caught: list[warnings.WarningMessage], words: str) -> list[str]:
    found: Mapping[str, None] = {
        f"{Path(warning.filename).parent.name}/{Path(warning.filename).name}:{warning.lineno}": None
        for warning in caught
        if words in str(warning.message)
    }
    return list(found)
