"""Fast mode on one host sums gradients through shared memory, as DistributedDataParallel would."""

import random
import re
import time
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit.engines import built, use_process_group
from kit.ranks import in_group, leave, run_ranks
from kit.small_runs import FAST, small_config
from kit.speed import slowness
from torch import Tensor, nn

from distributed.comm import all_gather, collectives
from distributed.comm.shared_sum import SharedSum
from distributed.config.engines import Ddp
from distributed.config.optim import Sgd
from distributed.data.batch import Batch
from distributed.engine.ddp import DdpEngine
from distributed.engine.prepare import Compute
from distributed.training.losses import CROSS_ENTROPY, build_losses
from distributed.training.steps import _shard_loss, train_step
from distributed.training.totals import TotalsAccumulator

CPU = torch.device("cpu")
LENGTHS = (1, 2, 7, 64, 1000, 4099)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SUMS = 40
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

pytestmark = pytest.mark.timeout(120)


def opened(length: int, dtype: torch.dtype, *, timeout_seconds: float = 30) -> SharedSum:
    shared = SharedSum.open(length, dtype, CPU, timeout_seconds=timeout_seconds)
    assert shared is not None
    return shared


def buffer_of(rank: int, number: int, length: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(length, generator=generator, dtype=torch.float64).to(dtype)


# The sum of a buffer


@in_group
def sum_buffers() -> list[str]:
    """Return what was wrong, over many sums with late ranks; while one rank checks, others may write their next buffers."""
    rank, world_size, timing, wrong = (
        collectives.rank(),
        collectives.world_size(),
        random.Random(collectives.rank()),
        [],
    )
    for length in LENGTHS:
        for dtype in DTYPES:
            shared = opened(length, dtype)
            for number in range(SUMS):
                if timing.random() < 0.05:
                    time.sleep(timing.choice((0.0002, 0.003)))
                buffers = [buffer_of(peer, number, length, dtype) for peer in range(world_size)]
                shared.own.copy_(buffers[rank])
                shared.sum()
                if not torch.equal(shared.total, reduce(torch.add, buffers)):
                    wrong.append(f"{length} x {dtype}, sum {number}")
    return wrong


@pytest.mark.parametrize("world_size", [2, 3])
def test_buffers_are_summed_in_rank_order(world_size: int) -> None:
    assert run_ranks(sum_buffers, world_size) == [[]] * world_size


@in_group
def lose_a_peer(loser: int) -> tuple[str, float]:
    shared = opened(100, torch.float32)
    shared.sum()
    if collectives.rank() == loser:
        leave()
    return failure_of(shared)


@in_group
def wait_for_a_silent_peer() -> tuple[str, float] | None:
    shared = opened(100, torch.float32, timeout_seconds=0.5)
    shared.sum()
    found = None if collectives.rank() == 1 else failure_of(shared)
    dist.barrier()  # until then rank 1 is alive and silent
    return found


def failure_of(shared: SharedSum) -> tuple[str, float]:
    """Return the error message of the next sum, and after how many seconds it was raised."""
    start = time.monotonic()
    try:
        shared.sum()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", time.monotonic() - start


def test_a_dead_peer_is_named_within_two_seconds() -> None:
    found = run_ranks(lose_a_peer, 3, 1)
    assert found.pop(1) is None
    for message, seconds in found:
        assert re.search(r"closed by peer: rank 1, process \d+ on \S+, has died", message)
        assert seconds < 2 * slowness()


def test_waiting_for_a_silent_peer_times_out() -> None:
    found = run_ranks(wait_for_a_silent_peer, 2)
    assert found[1] is None
    message, seconds = found[0]
    assert "timed out waiting" in message
    assert "rank 1" in message
    assert 0.5 <= seconds < 3 * slowness()


# The engine


def gradients_after(engine: Any, micro_batches: list[Batch]) -> tuple[dict[str, Tensor], int]:
    """Return each parameter's gradient after these micro-batches, and the bytes summed for it."""
    before = engine.reduced_bytes
    for index, batch in enumerate(micro_batches):
        engine.micro_step(partial(_shard_loss, CROSS_ENTROPY), batch, last=index == len(micro_batches) - 1)
    # Clones, since an engine's gradients may be views of one buffer.
    gradients = {name: p.grad.clone() for name, p in engine._plain.named_parameters()}
    engine.weights.zero_grad()
    return gradients, engine.reduced_bytes - before


@in_group
def gradients_of_both(channels_last: bool) -> list[list[tuple[dict[str, Tensor], int]]]:
    """Return the gradients of two steps through shared memory, and in DDP: for each step, those of the two engines.

    Four micro-batches in float64: 13 images in uneven shards, then 4 images, which leave most shards empty.
    """
    config = small_config(
        Path("unused"), exact=FAST, precision="float64", global_batch_size=13, grad_accum_steps=4,
        data={"train_samples": 13 + 4}, channels_last=channels_last,
    )  # fmt: skip
    shared, data = built(config)
    use_process_group()
    ddp, _ = built(config)
    assert [engine._ddp is None for engine in (shared, ddp)] == [True, False]
    return [
        [gradients_after(engine, micro_batches) for engine in (shared, ddp)] for micro_batches in data.train_epoch(0)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "channels_last"), [(2, True), (3, False)])
def test_gradients_match_ddp(world_size: int, channels_last: bool) -> None:
    ranks = run_ranks(gradients_of_both, world_size, channels_last)
    for step in range(2):
        (first, _), (expected, expected_bytes) = ranks[0][step]
        for of_rank in ranks:
            gradients, summed_bytes = of_rank[step][0]
            assert summed_bytes == expected_bytes == sum(gradient.nbytes for gradient in expected.values())
            for name, gradient in gradients.items():
                assert torch.equal(gradient, first[name]), f"{name}: ranks differ"
                assert gradient.stride() == expected[name].stride(), name
                torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-15)


class Branches(nn.Module):
    """`unused` receives no gradient; `frozen` needs none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.frozen = nn.Linear(12, 10), nn.Linear(2, 2), nn.Linear(10, 10)
        self.frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.frozen(self.used(images.flatten(1)))
        return logits


def batch_of_branches(rank: int, world_size: int) -> Batch:
    """Return a rank's part of a batch of six images."""
    own = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    images = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))[own]
    ids, keys = torch.arange(6)[own], torch.zeros(len(images), 2, dtype=torch.int64)
    return Batch(images, ids, ids, keys, global_count=6, shard_sizes=(len(images),))


def steps_of_branches(transport: str) -> tuple[dict[str, Tensor], int]:
    """Return the weights after two steps with weight decay, and the bytes exchanged for them."""
    if transport == "ddp":
        use_process_group()
    compute = Compute("float32", channels_last=False, device=CPU, timeout_seconds=5)
    batch, optim = batch_of_branches(collectives.rank(), collectives.world_size()), Sgd(weight_decay=0.1)
    engine = DdpEngine(Ddp(), Branches(), optim=optim, compute=compute, example=batch, compile=False)
    for step in range(2):
        engine.micro_step(partial(_shard_loss, CROSS_ENTROPY), batch, last=True)
        engine.step(0.1, step=step)
    return {
        name: parameter.detach().clone() for name, parameter in engine._plain.named_parameters()
    }, engine.reduced_bytes


@in_group
def steps_on_ranks(transport: str) -> tuple[dict[str, Tensor], int]:
    return steps_of_branches(transport)


@pytest.mark.parametrize("transport", ["memory", "ddp"])
def test_unused_and_frozen_parameters(transport: str) -> None:
    """Unused ones have gradients of zero, as in exact mode, so that they decay; frozen ones are neither sent nor changed."""
    before, (alone, _) = dict(Branches().named_parameters()), steps_of_branches("memory")
    trained_bytes = sum(parameter.nbytes for parameter in before.values() if parameter.requires_grad)
    assert torch.equal(alone["frozen.weight"], before["frozen.weight"])
    assert not torch.equal(alone["unused.weight"], before["unused.weight"])
    for found, sent_bytes in run_ranks(steps_on_ranks, 2, transport):
        assert sent_bytes == 2 * trained_bytes
        torch.testing.assert_close(found, alone)


class Adapters(nn.Module):
    """An adapter for dark images and one for bright ones, registered behind a batch norm that runs after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 10)
        # Each fills a bucket of DDP, which is then summed without waiting for other gradients.
        self.adapters = nn.ModuleList(nn.Sequential(nn.Linear(12, 15_000), nn.Linear(15_000, 12)) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x, added = images.flatten(1), torch.zeros(len(images), 12)
        bright = x.mean(1) > 0.5
        for adapter, rows in zip(self.adapters, (~bright, bright), strict=True):
            if rows.any():
                added = added.index_add(0, torch.nonzero(rows)[:, 0], adapter(x[rows]))
        logits: Tensor = self.head(self.norm(x + added))
        return logits


def steps_of_adapters(transport: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights after two steps, and the collectives in their order."""
    if transport == "ddp":
        use_process_group()
        vars(all_gather)["open_shared_memory"] = lambda size, device: None
    compute = Compute("float32", channels_last=False, device=CPU, timeout_seconds=5)
    batch = batch_of_branches(collectives.rank(), collectives.world_size())
    batch.images[:] = batch.images / 4 + torch.tensor([0.1 if i < 3 else 0.8 for i in batch.labels]).view(-1, 1, 1, 1)
    engine = DdpEngine(
        Ddp(bucket_mib=1), Adapters(), optim=Sgd(), compute=compute, example=batch, compile=False, conditional=True
    )
    calls: list[str] = []
    for name in ("all_reduce", GATHER):
        vars(dist)[name] = _recorded(name, calls)
    for step in range(2):
        engine.micro_step(partial(_shard_loss, CROSS_ENTROPY), batch, last=True)
        engine.step(0.1, step=step)
    return {name: p.detach().clone() for name, p in engine._plain.named_parameters()}, calls


def _recorded(name: str, calls: list[str]) -> Any:
    collective = getattr(dist, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return collective(*arguments, **options)

    return call


@in_group
def steps_of_adapters_on_ranks(transport: str) -> tuple[dict[str, Tensor], list[str]]:
    return steps_of_adapters(transport)


@pytest.mark.parametrize("transport", ["memory", "ddp"])
def test_ranks_that_use_different_parameters(transport: str) -> None:
    """Rank 0 has the dark images. DDP would start its bucket of the unused adapter before batch norm's collectives."""
    (alone, _) = steps_of_adapters("memory")
    (first, order), *others = run_ranks(steps_of_adapters_on_ranks, 2, transport)
    torch.testing.assert_close(first, alone)
    assert ("all_reduce" in order) == (transport == "ddp")
    for found, calls in others:
        assert calls == order
        torch.testing.assert_close(found, first, rtol=0, atol=0)


@in_group
def train_until_a_peer_dies() -> str:
    """Take a step, lose rank 1 in the next one's backward pass, and return the errors of the others."""
    config = small_config(Path("unused"), exact=FAST, model={"name": "cifar_alexnet"}, global_batch_size=6)
    engine, data = built(config)
    batches = data.train_epoch(0)
    train = {"loss": build_losses(config.loss).training, "lr": 0.01, "totals": TotalsAccumulator(CPU)}
    train_step(engine, next(batches), step=0, **train)
    if collectives.rank() == 1:
        leave()
    try:
        train_step(engine, next(batches), step=1, **train)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.slow
def test_training_ends_when_a_peer_dies() -> None:
    survivor, lost = run_ranks(train_until_a_peer_dies, 2)
    assert lost is None
    assert re.search(r"closed by peer: rank 1, process \d+ on \S+, has died", survivor)
