"""Fast mode: a config has the same loss curve at any world size, up to rounding.

`test_exact.py` checks that it is exact mode's curve, which is bit-identical at any world size.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from kit.ranks import in_group, once, run_ranks
from kit.small_runs import FAST, Recorder, small_config
from torch import Tensor, nn

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.models.alexnet import improved_alexnet
from distributed.recipe import train
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

STEPS = 26
# 13 steps per epoch; the last has three images, so that with two micro-batches some ranks are empty.
SETTINGS: dict[str, Any] = {"epochs": 2, "global_batch_size": 11, "data": {"train_samples": 135}}
CPU = torch.device("cpu")


@in_group
def losses_of_runs(folder: Path) -> dict[int, list[float]]:
    """Return the losses that this rank's sink received, for one and for two micro-batches per step."""
    found = {}
    for grad_accum_steps in (1, 2):
        recorder = Recorder()
        run_dir = folder / f"accumulation-{grad_accum_steps}"
        config = small_config(run_dir, precision="float64", grad_accum_steps=grad_accum_steps, exact=FAST, **SETTINGS)
        train(config, sinks=[recorder])
        found[grad_accum_steps] = [metrics.loss for metrics in recorder.steps]
    return found


Losses = Callable[[int], list[dict[int, list[float]]]]
"""Returns the losses that each rank saw at a world size; cached."""


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    @once
    def run(world_size: int) -> list[dict[int, list[float]]]:
        return run_ranks(losses_of_runs, world_size, tmp_path_factory.mktemp("runs"), timeout_seconds=150)

    return run


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("grad_accum_steps", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_float64_losses_match_one_process(losses: Losses, world_size: int, grad_accum_steps: int) -> None:
    expected = losses(1)[0][grad_accum_steps]
    found = losses(world_size)
    assert len(expected) == STEPS
    assert len(set(expected)) == STEPS
    worst = max(abs(a - b) / b for a, b in zip(found[0][grad_accum_steps], expected, strict=True))
    print(f"{world_size} ranks, accumulation {grad_accum_steps}: {len(expected)} losses within {worst:.1e}")
    assert worst < 1e-12
    assert all(rank == found[0] for rank in found), "the ranks' sinks received different losses"


@pytest.mark.timeout(160)
def test_two_micro_batches_have_a_different_curve(losses: Losses) -> None:
    """Negative control: batch norm sees half as many images, so the tests above distinguish one micro-batch from two."""
    one, two = losses(1)[0].values()
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) > 0.01


def float32_config(folder: Path) -> TrainConfig:
    """Without weight decay, momentum that starts at zero equals the gradient after a step."""
    return small_config(folder / "unused", optim={"lr": 0.01, "weight_decay": 0.0}, exact=FAST, **SETTINGS)


def steps_from_given_weights(config: TrainConfig, weights_of: Callable[[int], dict[str, Tensor]]) -> Iterator[Any]:
    """Yield (weights before, loss, gradients, weights after) per step, starting from the given weights without momentum; from
    the initial weights if none are given."""
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    engine, sums = build_engine(config, topology, data, CPU), TotalsAccumulator(CPU)
    steps = (batches for epoch in range(config.epochs) for batches in data.train_epoch(epoch))
    for step, micro_batches in enumerate(steps):
        before = {**(weights_of(step) or model_of(engine.state()))}
        engine.load_state(before)
        train_step(
            engine, micro_batches, loss=build_losses(config.loss).training, lr=config.peak_lr, step=step, totals=sums
        )
        state = {name: tensor.clone() for name, tensor in engine.state()}
        gradients = {name: tensor for name, tensor in state.items() if name.endswith("momentum_buffer")}
        yield before, sums.read().mean_loss, gradients, model_of(state.items())


def model_of(state: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state if name.startswith("model.")}


@in_group
def write_trajectory(folder: Path) -> int:
    """Take one process's steps, each from the previous one's weights; write one file per step. Return the number of steps."""
    config = float32_config(folder)
    last: dict[str, Tensor] = {}
    count = 0
    for before, loss, gradients, after in steps_from_given_weights(config, lambda _: last):
        torch.save({"before": before, "loss": loss, "gradients": gradients}, folder / f"{count}.pt")
        last.update(after)
        count += 1
    return count


def conv_biases() -> set[str]:
    """Return the names of biases before batch norm, which cancels them: their gradients are rounding error only."""
    modules = improved_alexnet(10, 0.5).named_modules()
    return {f"optimizer.{name}.bias.momentum_buffer" for name, module in modules if isinstance(module, nn.Conv2d)}


@dataclass(frozen=True)
class Differences:
    """Relative differences of one step: of the loss; the median over all gradient elements; the median per parameter."""

    loss: float
    gradient: float
    parameters: dict[str, float]


@in_group
def compare_with_trajectory(folder: Path) -> list[Differences]:
    """Compare each step, taken from the trajectory's weights, with the trajectory's step."""
    files = [torch.load(folder / f"{step}.pt", mmap=True) for step in range(STEPS)]
    steps = steps_from_given_weights(float32_config(folder), lambda step: files[step]["before"])
    ignored = conv_biases()
    found = []
    for expected, (_, loss, gradients, _) in zip(files, steps, strict=True):
        by_name = {
            name: relative_differences(gradients[name], gradient)
            for name, gradient in expected["gradients"].items()
            if name not in ignored
        }
        medians = {name: differences.median().item() for name, differences in by_name.items()}
        everywhere = torch.cat(list(by_name.values())).median().item()
        found.append(Differences(abs(loss - expected["loss"]) / expected["loss"], everywhere, medians))
    return found


def relative_differences(found: Tensor, expected: Tensor) -> Tensor:
    """Return elementwise relative differences, flattened; zero where both are zero."""
    return torch.where(found == expected, 0.0, (found - expected).abs() / expected.abs()).flatten()


@pytest.fixture(scope="module")
def trajectory() -> Iterator[Path]:
    """Write the trajectory, some 400 MB, for the tests of this module."""
    with tempfile.TemporaryDirectory(prefix="trajectory-") as name:
        assert run_ranks(write_trajectory, 1, Path(name)) == [STEPS]
        yield Path(name)


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("world_size", [2, 3])
def test_float32_steps_match_one_process(trajectory: Path, world_size: int) -> None:
    """Bounds each step's loss, the median over its entire gradient, and each parameter's median over the steps.

    Not every parameter at every step: if rounding flips a ReLU or a maximum, all gradients before it change a little.
    """
    ranks = run_ranks(compare_with_trajectory, world_size, trajectory, timeout_seconds=150)
    steps = ranks[0]
    loss = max(step.loss for step in steps)
    gradient = max(step.gradient for step in steps)
    of_parameters = {name: median(step.parameters[name] for step in steps) for name in steps[0].parameters}
    worst = max(of_parameters, key=lambda name: of_parameters[name])
    calm = sum(max(step.parameters.values()) < 1e-5 for step in steps)
    print(
        f"{world_size} ranks, {len(steps)} steps: loss within {loss:.1e}, median of the gradient within {gradient:.1e}, "
        f"of a parameter within {of_parameters[worst]:.1e} ({worst}); in {calm} steps all parameters below 1e-5"
    )
    assert len(steps) == STEPS
    assert len(of_parameters) == 21, "26 parameters, five of them biases before batch norm"
    assert loss < 1e-6
    assert gradient < 1e-5
    assert of_parameters[worst] < 1e-5, worst
    assert calm > STEPS / 2
    assert all(rank == steps for rank in ranks), "the ranks have different losses or gradients"
