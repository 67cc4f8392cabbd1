"""Compressed gradients: sums that are right, errors that are not lost, runs that go on as if they had not stopped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, newest_checkpoint, small_config
from kit.traces import Trace, tensors_of, traced
from loguru import logger
from torch import Tensor

from distributed.build import build_data, build_engine
from distributed.checkpoint.snapshot import load_checkpoint
from distributed.comm import collectives
from distributed.comm.collectives import rank, world_size
from distributed.config import TrainConfig
from distributed.engine.powersgd import PowerSgd
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.steps import train_step
from distributed.training.totals import MetricAccumulator

CPU = torch.device("cpu")
BFLOAT16: dict[str, Any] = {"name": "ddp", "compression": "bfloat16"}
POWERSGD: dict[str, Any] = {"name": "ddp", "compression": "powersgd", "powersgd_rank": 2}
PLAIN: dict[str, Any] = {"name": "ddp"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def config_of(run_dir: Path, engine: dict[str, Any], precision: str = "float32", **settings: Any) -> TrainConfig:
    """10 steps of two micro-batches an epoch, gradients clipped; of the last step's image most ranks have none."""
    return small_config(
        run_dir, precision=precision, engine=engine, exact=FAST, epochs=1, global_batch_size=11, grad_accum_steps=2,
        data={"train_samples": 100, "validation_fraction": 0.0}, optim={"lr": 0.01, "max_grad_norm": 1.0}, **settings,
    )  # fmt: skip


def built(config: TrainConfig) -> tuple[Any, Iterator[Any]]:
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    return build_engine(config, topology, data, CPU), data.train_epoch(0)


# Sums


@in_group
def gradients_of_a_step(engine: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """(the gradient of each parameter, bytes that were all-reduced for it) of the first step's only micro-batch."""
    made, batches = built(small_config(Path("unused"), engine=engine, exact=FAST))
    (batch,) = next(batches)

    def loss(model: Any, part: Any) -> Any:
        losses = torch.nn.functional.cross_entropy(model(part.images, part.sample_keys), part.labels, reduction="none")
        return losses.sum() / part.step_size, None

    made.micro_step(loss, batch, last=True)
    # Clones: what an engine hands out may be views of one buffer.
    return {name: p.grad.clone() for name, p in made._plain.named_parameters()}, made.reduced_bytes


def test_rounded_gradients_are_those_of_plain_sums_to_bfloat16_and_half_the_bytes() -> None:
    plain = run_ranks(gradients_of_a_step, 3, PLAIN)
    rounded = run_ranks(gradients_of_a_step, 3, BFLOAT16)
    expected, whole = plain[0]
    assert whole == sum(gradient.nbytes for gradient in expected.values())
    for gradients, sent in rounded:
        assert 2 * sent == whole
        for name, gradient in gradients.items():
            assert torch.equal(gradient, rounded[0][0][name]), "all ranks have the same"
            assert torch.equal(gradient, gradient.bfloat16().float()), "it was sent in bfloat16"
    found, truth = (torch.cat([g[name].flatten() for name in expected]) for g in (rounded[0][0], expected))
    relative = float((found - truth).norm() / truth.norm())
    print(f"off by {relative:.1e} of the norm")
    assert 1e-4 < relative < 2**-7


@in_group
def factored_sums(steps: int) -> dict[str, Any]:
    """In float64: what was applied over some steps, the true sums, the errors left, and a sum of the factors' rank."""
    columns, shapes = 2, {"fc.weight": (24, 40), "fc.bias": (24,), "conv.weight": (16, 8, 3, 3)}
    held = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    compressed = PowerSgd(held, columns=columns, seed=0)
    applied, truth = ({name: torch.zeros_like(p) for name, p in held.items()} for _ in range(2))
    for step in range(steps):
        for name, parameter in held.items():
            parameter.grad = torch.randn(shapes[name], generator=torch.Generator().manual_seed(10 * step + rank())).to(
                torch.float64
            )
            truth[name] += collectives.sum_over_ranks_(parameter.grad.clone())
        compressed.reduce()
        for name, parameter in held.items():
            applied[name] += parameter.grad
    state = {name: tensor.clone() for name, tensor in compressed.state()}
    return {"applied": applied, "truth": truth, "state": state, "bytes": compressed.reduced_bytes}


@pytest.mark.parametrize("size", [2, 3])
def test_what_was_applied_and_the_errors_of_all_ranks_add_up_to_the_true_sums(size: int) -> None:
    ranks = run_ranks(factored_sums, size, 5)
    for found in ranks:
        for name in ("fc.weight", "conv.weight"):
            applied, truth = found["applied"][name], found["truth"][name]
            errors = found["state"][f"compression.{name}.error"]
            assert errors.shape == (size, truth.shape[0], truth[0].numel())
            assert float(errors.sum(0).norm()) > 1.0, "there is an error"
            assert torch.allclose(applied + errors.sum(0).view(truth.shape), truth, rtol=1e-12, atol=1e-12)
            assert torch.equal(applied, ranks[0]["applied"][name]), "all ranks have the same"
        assert torch.allclose(found["applied"]["fc.bias"], found["truth"]["fc.bias"], rtol=1e-13)
        assert found["bytes"] == 5 * 8 * (2 * (24 + 40) + 24 + 2 * (16 + 72))


@in_group
def sum_of_low_rank() -> float:
    """How far off the sum is where that is of the factors' rank, and no rank's own gradient is."""
    held = {"fc.weight": torch.zeros(24, 40, dtype=torch.float64)}
    compressed = PowerSgd(held, columns=2, seed=0)
    generator = torch.Generator().manual_seed(0)
    noise, left, right = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((24, 40), (24, 2), (2, 40))
    )
    held["fc.weight"].grad = {0: left @ right + noise, 1: -noise}.get(rank(), torch.zeros_like(noise))
    compressed.reduce()
    return float((held["fc.weight"].grad - left @ right).norm() / (left @ right).norm())


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_of_the_factors_rank_is_found_in_one_step_whatever_the_ranks_differ_in(size: int) -> None:
    assert max(run_ranks(sum_of_low_rank, size)) < 1e-12


# Runs


@in_group
def whole_run(folder: Path) -> Trace:
    return traced(config_of(folder / str(world_size()), POWERSGD, "float64"))


@in_group
def next_attempt(run_dir: Path, stop_after: int | None) -> tuple[Trace, dict[str, Tensor], list[str]]:
    """The next steps of a run, the errors that its engine began them with, and what was said of them."""
    config, said, sums = config_of(run_dir, POWERSGD, "float64"), list[str](), dict[str, Tensor]()
    sink = logger.add(lambda message: said.append(message.record["message"]), level="INFO")
    if RunFolder(run_dir).newest_state():
        made, _ = built(config)
        load_checkpoint(newest_checkpoint(run_dir), made)
        sums = {name: tensor.sum(0) for name, tensor in made.state() if name.endswith(".error")}
    logger.remove(sink)
    return traced(config, stop_after), sums, [line for line in said if line.startswith("compression:")]


ATTEMPTS = (3, 1, 4)


def test_the_curve_and_what_is_left_over_are_the_same_on_any_number_of_processes_and_through_changes(
    tmp_path: Path,
) -> None:
    """In float64: an error that was lost, counted twice or averaged would part the curves."""
    alone, *others = (run_ranks(whole_run, size, tmp_path, timeout_seconds=120)[0] for size in (1, 3))
    assert len(alone.steps) == 10
    run, steps = RunFolder(tmp_path / "changes"), []
    for size in ATTEMPTS:
        before = tensors_of(run) if steps else {}
        last = size == ATTEMPTS[-1]
        ranks = run_ranks(next_attempt, size, run.path, None if last else 2, timeout_seconds=120)
        for trace, sums, said in ranks:
            assert all(torch.allclose(sums[name], before[name].sum(0), rtol=1e-12, atol=1e-15) for name in sums)
            assert bool(sums) == bool(before)
            assert len(said) == bool(before)
            assert trace.steps == ranks[0][0].steps
        steps += ranks[0][0].steps
    for found in (*(other.steps for other in others), steps):
        assert [step["step"] for step in found] == [step["step"] for step in alone.steps]
        worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(found, alone.steps, strict=True))
        print(f"losses within {worst:.1e}")
        assert worst < 1e-9


@in_group
def undisturbed_and_stopped(folder: Path) -> dict[str, list[Trace]]:
    traces = {}
    for name, engine in (("bfloat16", BFLOAT16), ("powersgd", POWERSGD)):
        traces[name] = [traced(config_of(folder / name / "undisturbed", engine))]
        for stop_after in (2, 3, None):
            traces[name].append(traced(config_of(folder / name / "stopped", engine), stop_after))
    return traces


def test_at_the_same_number_of_processes_a_stopped_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    for traces in run_ranks(undisturbed_and_stopped, 3, tmp_path, timeout_seconds=200):
        for name, (undisturbed, *parts) in traces.items():
            assert [part.ended[2] for part in parts] == [True, True, False]
            assert [step for part in parts for step in part.steps] == undisturbed.steps
            assert parts[-1].tensors == undisturbed.tensors
            assert any(tensor.startswith("compression.") for tensor in undisturbed.tensors) == (name == "powersgd")


# Others' checkpoints


@in_group
def loaded_elsewhere(run_dir: Path, others: list[dict[str, Any]]) -> list[bool]:
    """Whether each engine takes the weights of a run whose gradients were compressed, and goes on."""
    found, saved = [], tensors_of(RunFolder(run_dir))
    for settings in others:
        config = small_config(Path("unused"), **settings)
        made, batches = built(config)
        load_checkpoint(newest_checkpoint(run_dir), made)
        own = {name: tensor.clone() for name, tensor in made.state()}
        assert not any(name.startswith("compression.") for name in own)
        same = all(torch.equal(tensor, saved[name]) for name, tensor in own.items())
        norm = train_step(made, next(batches), loss=config.loss, lr=0.01, step=0, metrics=MetricAccumulator(CPU))
        found.append(same and bool(torch.isfinite(norm)))
    return found


def test_every_other_engine_takes_such_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(next_attempt, 2, tmp_path / "run", 3, timeout_seconds=120)
    of_float64 = {"precision": "float64"}
    others = [
        {"engine": PLAIN, "exact": FAST}, {"engine": BFLOAT16, "exact": FAST}, {"engine": {"name": "fsdp"}},
        {"exact": {"shards": 4}},
    ]  # fmt: skip
    for found in run_ranks(loaded_elsewhere, 2, tmp_path / "run", [o | of_float64 for o in others]):
        assert found == [True] * len(others)
