"""Gradients compressed to bfloat16: correct sums, half the bytes, bit-identical resumes, checkpoints every engine can load."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.engines import use_process_group
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, newest_checkpoint, small_config
from kit.traces import Trace, tensors_of, traced
from torch import Tensor

from distributed.build import build_data, build_engine
from distributed.checkpoint.tensor_file import read_tensors
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.models.keyed_dropout import use_sample_keys
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

CPU = torch.device("cpu")
BFLOAT16: dict[str, Any] = {"name": "ddp", "compression": "bfloat16"}
PLAIN: dict[str, Any] = {"name": "ddp"}
TRANSPORTS = ("memory", "ddp")
"""How gradients are summed: through shared memory, or in DistributedDataParallel, as on several hosts."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def config_of(run_dir: Path, engine: dict[str, Any]) -> TrainConfig:
    """10 steps per epoch, each of two micro-batches, with clipped gradients. In the last step most ranks have no image."""
    return small_config(
        run_dir, engine=engine, exact=FAST, epochs=1, global_batch_size=11, grad_accum_steps=2,
        data={"train_samples": 100, "validation_fraction": 0.0}, optim={"lr": 0.01, "max_grad_norm": 1.0},
    )  # fmt: skip


def built(config: TrainConfig) -> tuple[Any, Iterator[Any]]:
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    return build_engine(config, topology, data, CPU), data.train_epoch(0)


# Sums


@in_group
def gradients_of_first_step(transport: str, engine: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Return each parameter's gradient in the first step, of one micro-batch, and the bytes summed for it."""
    if transport == "ddp":
        use_process_group()
    made, batches = built(small_config(Path("unused"), engine=engine, exact=FAST))
    (batch,) = next(batches)

    def loss(model: Any, part: Any) -> Any:
        with use_sample_keys(part.sample_keys):
            losses = torch.nn.functional.cross_entropy(model(part.images), part.labels, reduction="none")
        return losses.sum() / part.global_count, None

    made.micro_step(loss, batch, last=True)
    # Clones, since an engine's gradients may be views of one buffer.
    return {name: p.grad.clone() for name, p in made._plain.named_parameters()}, made.reduced_bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bfloat16_halves_the_bytes_and_rounds_the_sums(transport: str) -> None:
    plain = run_ranks(gradients_of_first_step, 3, transport, PLAIN)
    rounded = run_ranks(gradients_of_first_step, 3, transport, BFLOAT16)
    expected, plain_bytes = plain[0]
    assert plain_bytes == sum(gradient.nbytes for gradient in expected.values())
    for gradients, rounded_bytes in rounded:
        assert 2 * rounded_bytes == plain_bytes
        for name, gradient in gradients.items():
            assert torch.equal(gradient, rounded[0][0][name]), "all ranks have the same sums"
            assert torch.equal(gradient, gradient.bfloat16().float()), "sums are bfloat16 numbers"
    found, truth = (torch.cat([g[name].flatten() for name in expected]) for g in (rounded[0][0], expected))
    relative = float((found - truth).norm() / truth.norm())
    print(f"relative error of the gradient: {relative:.1e}")
    assert 1e-4 < relative < 2**-7


# Resume


@in_group
def uninterrupted_and_stopped(folder: Path, transport: str) -> list[Trace]:
    if transport == "ddp":
        use_process_group()
    uninterrupted = traced(config_of(folder / "uninterrupted", BFLOAT16))
    return [
        uninterrupted,
        *(traced(config_of(folder / "stopped", BFLOAT16), stop_after) for stop_after in (2, 3, None)),
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stopped_run_ends_with_the_same_bits(transport: str, tmp_path: Path) -> None:
    for uninterrupted, *attempts in run_ranks(uninterrupted_and_stopped, 3, tmp_path, transport, timeout_seconds=200):
        assert len(uninterrupted.steps) == 10
        assert [attempt.stopped for attempt in attempts] == [True, True, False]
        assert [step for attempt in attempts for step in attempt.steps] == uninterrupted.steps
        assert attempts[-1].tensors == uninterrupted.tensors


# Checkpoints


@in_group
def stopped_run(run_dir: Path) -> Trace:
    return traced(config_of(run_dir, BFLOAT16), 3)


@in_group
def loaded_elsewhere(run_dir: Path, others: list[dict[str, Any]]) -> list[bool]:
    """For each engine, whether it loads the run's weights bit for bit and takes another step."""
    found, saved = [], tensors_of(RunFolder(run_dir))
    for settings in others:
        config = small_config(Path("unused"), **settings)
        made, batches = built(config)
        made.load_state(read_tensors(newest_checkpoint(run_dir)))
        own = {name: tensor.clone() for name, tensor in made.state()}
        same = all(torch.equal(tensor, saved[name]) for name, tensor in own.items())
        norm = train_step(
            made,
            next(batches),
            loss=build_losses(config.loss).training,
            lr=0.01,
            step=0,
            totals=TotalsAccumulator(CPU),
        )
        found.append(same and bool(torch.isfinite(norm)))
    return found


def test_every_engine_loads_the_checkpoint(tmp_path: Path) -> None:
    run_ranks(stopped_run, 2, tmp_path / "run", timeout_seconds=120)
    others = [
        {"engine": PLAIN, "exact": FAST}, {"engine": BFLOAT16, "exact": FAST}, {"engine": {"name": "fsdp"}},
        {"exact": {"shards": 4}},
    ]  # fmt: skip
    for found in run_ranks(loaded_elsewhere, 2, tmp_path / "run", others):
        assert found == [True] * len(others)
