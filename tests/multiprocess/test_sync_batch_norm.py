"""Synchronized batch norm over ranks equals BatchNorm over the full batch: values, gradients and running statistics."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from kit.ranks import in_group, once, run_ranks
from torch import Tensor, nn

from distributed.comm import collectives
from distributed.comm.all_gather import AllGather, SharedMemoryAllGather, open_all_gather, process_group_all_gather
from distributed.models.sync_batch_norm import SyncBatchNorm, one_shard_per_rank

CHANNELS, STEPS = 5, 4
CPU = torch.device("cpu")
QUANTITIES = ("output", "input gradient", "weight gradient", "bias gradient", "running mean", "running variance")


@dataclass(frozen=True)
class Case:
    """How a batch is split over the ranks, the shape of one channel of a sample, and the layer's momentum."""

    shards: tuple[int, ...]
    shape: tuple[int, ...] = (6, 4)
    channels_last: bool = False
    dtype: torch.dtype = torch.float64
    momentum: float | None = 0.1
    shared_memory: bool = True
    affine: bool = True
    tracked: bool = True

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.shards))
        layout = "channels_last" if self.channels_last else "contiguous"
        transport = "shared_memory" if self.shared_memory else "process_group"
        shape = "x".join(map(str, self.shape)) or "flat"
        average = "" if self.momentum else "-cumulative"
        without = "" if self.affine else "-no_weight"
        without += "" if self.tracked else "-no_statistics"
        return f"{sizes}-{shape}-{layout}-{str(self.dtype)[6:]}-{transport}{average}{without}"


SIZES = [(7, 2), (7, 0), (0, 7), (4, 4), (5, 3, 1), (0, 5, 3), (4, 0, 0)]
FLOAT64 = [
    Case(sizes, channels_last=channels_last, shared_memory=shared_memory)
    for sizes in SIZES
    for channels_last in (False, True)
    for shared_memory in (False, True)
]
FLOAT64 += [Case(sizes, shape) for sizes in SIZES for shape in ((), (3,))]  # BatchNorm1d: [n, c] and [n, c, length]
FLOAT64 += [Case((5, 2), momentum=None), Case((5, 3, 1), momentum=None)]
FLOAT64 += [Case((5, 0, 2), (2, 3, 2)), Case((5, 2), affine=False), Case((0, 5, 3), (3,), affine=False)]
FLOAT64 += [Case(sizes, affine=affine, tracked=False) for sizes in ((5, 2), (0, 5, 3)) for affine in (True, False)]
BFLOAT16 = [
    replace(case, dtype=torch.bfloat16)
    for case in FLOAT64
    if len(case.shape) == 2 and case.shared_memory and case.momentum and case.tracked
]
CASES = FLOAT64 + BFLOAT16


@in_group
def compare_cases(cases: list[Case]) -> dict[Case, dict[str, float]]:
    gathers: dict[bool, AllGather] = {False: process_group_all_gather, True: open_all_gather(CPU, timeout_seconds=30)}
    assert isinstance(gathers[True], SharedMemoryAllGather)
    return {case: differences(case, gathers[case.shared_memory]) for case in cases}


def differences(case: Case, gather: AllGather) -> dict[str, float]:
    """Return the largest difference of each quantity over all elements of this rank and several steps with changing weights,
    relative to the largest expected element."""
    layer_type = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(len(case.shape), nn.BatchNorm1d)
    options = {"momentum": case.momentum, "affine": case.affine, "track_running_stats": case.tracked}
    # With bfloat16 images weights are float32, as under autocast; expected values are always computed in float64.
    weight_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    full = layer_type(CHANNELS, **options).double()
    sync = SyncBatchNorm.of(layer_type(CHANNELS, **options).to(weight_dtype), one_shard_per_rank(gather))
    random = torch.Generator().manual_seed(1)
    start = sum(case.shards[: collectives.rank()])
    own = slice(start, start + case.shards[collectives.rank()])
    found = dict.fromkeys(QUANTITIES, 0.0)

    def compare(quantity: str, value: Tensor, expected: Tensor) -> None:
        if value.numel():
            scale = expected.abs().max().clamp(min=1e-3)
            found[quantity] = max(found[quantity], ((value.double() - expected).abs().max() / scale).item())

    for _ in range(STEPS):
        weights = torch.randn(2, CHANNELS, generator=random)
        for layer in (full, sync):
            for parameter, values in zip(layer.parameters(), weights, strict=False):
                parameter.data.copy_(values)
            layer.zero_grad()
        size = (sum(case.shards), CHANNELS, *case.shape)
        memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        # A mean far from zero, so that a difference of squares would lose precision.
        images, weights_of_loss = (
            (torch.randn(size, generator=random, dtype=torch.float64) * 2 + offset).to(case.dtype) for offset in (9, 0)
        )
        x_full = images.to(torch.float64, copy=True).requires_grad_()
        y_full = full(x_full)
        (y_full * weights_of_loss.double()).sum().backward()
        x = images[own].contiguous(memory_format=memory_format).requires_grad_()
        y = sync(x)
        (y * weights_of_loss[own].contiguous(memory_format=memory_format)).sum().backward()

        assert y.dtype == case.dtype
        assert y.is_contiguous(memory_format=memory_format)
        compare("output", y.detach(), y_full.detach()[own])
        compare("input gradient", x.grad, x_full.grad[own])
        if case.affine:
            compare("weight gradient", collectives.sum_over_ranks_(sync.weight.grad), full.weight.grad)
            compare("bias gradient", collectives.sum_over_ranks_(sync.bias.grad), full.bias.grad)
        if case.tracked:
            compare("running mean", sync.running_mean, full.running_mean)
            compare("running variance", sync.running_var, full.running_var)
            assert sync.num_batches_tracked == full.num_batches_tracked
    for layer in (full, sync):
        layer.eval()
    # Without running statistics an evaluation is synchronized too.
    compare("output", sync(images[own]).detach(), full(images.double()).detach()[own])
    return found


@pytest.fixture(scope="module")
def measured() -> Callable[[Case], dict[str, float]]:
    """Return a function from a case to the largest differences on any rank; cases of one world size share its processes."""

    @once
    def of_world_size(world_size: int) -> list[dict[Case, dict[str, float]]]:
        return run_ranks(compare_cases, world_size, [case for case in CASES if len(case.shards) == world_size])

    def of_case(case: Case) -> dict[str, float]:
        ranks = of_world_size(len(case.shards))
        return {quantity: max(rank[case][quantity] for rank in ranks) for quantity in QUANTITIES}

    return of_case


@pytest.mark.timeout(90)
@pytest.mark.parametrize("case", FLOAT64, ids=str)
def test_float64_matches_the_full_batch(measured: Callable[[Case], dict[str, float]], case: Case) -> None:
    found = measured(case)
    print(found)
    assert {quantity: difference for quantity, difference in found.items() if difference > 1e-12} == {}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_is_off_by_rounding_only(measured: Callable[[Case], dict[str, float]], case: Case) -> None:
    found = measured(case)
    print(found)
    assert found["output"] < 2**-7
    assert found["input gradient"] < 2**-6
    assert found["weight gradient"] < 1e-4
    assert found["bias gradient"] < 1e-4
    assert found["running mean"] < 1e-5
    assert found["running variance"] < 1e-5
