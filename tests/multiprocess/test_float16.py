"""float16 with loss scaling under every engine: overflows skip the same steps on all ranks, also after resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.ranks import in_group, once, run_ranks
from kit.small_runs import FAST, small_config
from kit.traces import Trace, traced

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.comm.collectives import world_size
from distributed.config import TrainConfig
from distributed.optim import loss_scale
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

CPU = torch.device("cpu")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": {"name": "ddp"}, "exact": FAST},
    "fsdp": {"engine": {"name": "fsdp"}},
    "exact": {"exact": {"shards": 2}},
    "bfloat16 sums": {"engine": {"name": "ddp", "compression": "bfloat16"}, "exact": FAST},
}
OVERFLOWING_SCALE = 2.0**21
"""An initial scale with which gradients overflow in the first three steps or so."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def config_of(run_dir: Path, engine: str, precision: str = "float16", **settings: Any) -> TrainConfig:
    """8 steps of two micro-batches, EMA, a log line every third step."""
    return small_config(
        run_dir, precision=precision, epochs=1, global_batch_size=8, grad_accum_steps=2, **ENGINES[engine],
        optim={"lr": 0.01, "ema_decay": 0.9, "max_grad_norm": 1.0}, data={"train_samples": 64, "test_samples": 10},
        logging={"every_steps": 3, "tensorboard": False, "curves": False, "level": "WARNING"}, **settings,
    )  # fmt: skip


@in_group
def steps_of(engine: str, precision: str) -> tuple[list[float], list[bool]]:
    """Return each step's mean loss and whether it was skipped; check that a skipped step changes only the loss scale."""
    loss_scale.INITIAL_SCALE = OVERFLOWING_SCALE
    config = config_of(Path("unused"), engine, precision)
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    made, sums = build_engine(config, topology, data, CPU), TotalsAccumulator(CPU)
    losses, skipped = [], []
    for step, micro_batches in enumerate(data.train_epoch(0)):
        before = {name: tensor.clone() for name, tensor in made.state()}
        norm = train_step(made, micro_batches, loss=build_losses(config.loss).training, lr=0.01, step=step, totals=sums)
        read = sums.read()
        losses.append(read.mean_loss)
        skipped.append(bool(read.skipped_steps))
        assert skipped[-1] == (not norm.isfinite())
        changed = {name for name, tensor in made.state() if not torch.equal(before[name], tensor)}
        if skipped[-1]:
            # The forward pass has updated batch-norm statistics, but not their EMA.
            assert {name for name in changed if "running_" not in name and "num_batches" not in name} == {
                "scaler.scale"
            }
            assert not any(name.startswith("ema.") for name in changed)
        else:
            assert {name.partition(".")[0] for name in changed} >= {"model", "optimizer", "ema"}
    assert {tensor.dtype for name, tensor in made.state() if tensor.is_floating_point()} == {torch.float32}
    return losses, skipped


@once
def on_all_ranks(engine: str, size: int) -> list[tuple[list[float], list[bool]]]:
    return run_ranks(steps_of, size, engine, "float16", timeout_seconds=120)


@pytest.fixture(scope="module")
def in_float32() -> float:
    """Return the loss of the first step."""
    losses, skipped = run_ranks(steps_of, 1, "ddp", "float32")[0]
    assert not any(skipped)
    return losses[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("engine", "size"), [("ddp", 1), ("ddp", 3), ("fsdp", 2), ("exact", 2), ("bfloat16 sums", 2)])
def test_overflows_skip_the_same_steps_on_all_ranks(in_float32: float, engine: str, size: int) -> None:
    ranks = on_all_ranks(engine, size)
    losses, skipped = ranks[0]
    assert ranks == [ranks[0]] * size
    first_good = skipped.index(False)
    print(f"{engine}, {size} ranks: {first_good} skipped, then {losses}")
    assert 2 <= first_good <= 5
    assert not any(skipped[first_good:])
    assert losses[0] == pytest.approx(in_float32, rel=1e-3)


def test_all_engines_skip_the_same_steps() -> None:
    replicated = on_all_ranks("ddp", 3)[0]
    for name in ("fsdp", "exact"):
        losses, skipped = on_all_ranks(name, 2)[0]
        assert skipped == replicated[1]
        assert losses == pytest.approx(replicated[0], rel=3e-3)


@in_group
def undisturbed_and_stopped(folder: Path, engine: str) -> list[Trace]:
    loss_scale.INITIAL_SCALE = OVERFLOWING_SCALE
    name = f"{engine} {world_size()}"
    traces = [traced(config_of(folder / name / "undisturbed", engine))]
    for stop_after in (1, 3, None):  # takes effect one step later: amid skipped steps, and after them
        traces.append(traced(config_of(folder / name / "stopped", engine), stop_after))
    return traces


def check_resuming(folder: Path, engine: str, size: int) -> Trace:
    ranks = run_ranks(undisturbed_and_stopped, size, folder, engine, timeout_seconds=200)
    for undisturbed, *attempts in ranks:
        assert [attempt.stopped for attempt in attempts] == [True, True, False]
        assert [step for attempt in attempts for step in attempt.steps] == undisturbed.steps
        assert attempts[-1].tensors == undisturbed.tensors
        assert {"scaler.scale", "scaler.good_steps"} <= undisturbed.tensors.keys()
        counts = [step["skipped_steps"] for step in undisturbed.steps]
        assert sum(counts) >= 2
        assert counts[0] == 3 or counts[1] == 0
    return ranks[0][0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_resuming_amid_overflows_is_bit_identical(tmp_path: Path, engine: str) -> None:
    check_resuming(tmp_path, engine, 2)


def test_exact_mode_is_bit_identical_on_one_and_two_ranks(tmp_path: Path) -> None:
    alone, both = (check_resuming(tmp_path, "exact", size) for size in (1, 2))
    assert both.steps == alone.steps
    assert both.epochs == alone.epochs
    assert both.tensors == alone.tensors
