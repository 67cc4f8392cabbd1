"""Synchronized batch norm over shards is BatchNorm over the whole batch: values, gradients and running statistics."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from kit.ranks import in_group, once, run_ranks
from torch import Tensor, nn

from distributed.comm import collectives
from distributed.comm.all_gather import AllGather, SharedMemoryAllGather, open_all_gather, process_group_all_gather
from distributed.models.sync_batch_norm import SyncBatchNorm, by_ranks

CHANNELS, STEPS = 5, 4
CPU = torch.device("cpu")
QUANTITIES = ("output", "input gradient", "weight gradient", "bias gradient", "running mean", "running variance")


@dataclass(frozen=True)
class Case:
    """How a batch is cut over the ranks, what an element of it looks like, and the layer's momentum."""

    shards: tuple[int, ...]
    shape: tuple[int, ...] = (6, 4)
    channels_last: bool = False
    dtype: torch.dtype = torch.float64
    momentum: float | None = 0.1
    shared_memory: bool = True

    def __str__(self) -> str:
        cut = "+".join(map(str, self.shards))
        layout = "channels_last" if self.channels_last else "contiguous"
        way = "shared_memory" if self.shared_memory else "process_group"
        shape = "x".join(map(str, self.shape)) or "flat"
        average = "" if self.momentum else "-cumulative"
        return f"{cut}-{shape}-{layout}-{str(self.dtype)[6:]}-{way}{average}"


CUTS = [(7, 2), (7, 0), (0, 7), (4, 4), (5, 3, 1), (0, 5, 3), (4, 0, 0)]
FLOAT64 = [
    Case(cut, channels_last=channels_last, shared_memory=shared_memory)
    for cut in CUTS
    for channels_last in (False, True)
    for shared_memory in (False, True)
]
FLOAT64 += [Case(cut, shape) for cut in CUTS for shape in ((), (3,))]  # BatchNorm1d: [n, c] and [n, c, length]
FLOAT64 += [Case((5, 2), momentum=None), Case((5, 3, 1), momentum=None)]
BFLOAT16 = [
    replace(case, dtype=torch.bfloat16)
    for case in FLOAT64
    if len(case.shape) == 2 and case.shared_memory and case.momentum
]
CASES = FLOAT64 + BFLOAT16


@in_group
def compare(cases: list[Case]) -> dict[Case, dict[str, float]]:
    gathers: dict[bool, AllGather] = {False: process_group_all_gather, True: open_all_gather(CPU, timeout_seconds=30)}
    assert isinstance(gathers[True], SharedMemoryAllGather)
    return {case: differences(case, gathers[case.shared_memory]) for case in cases}


def differences(case: Case, gather: AllGather) -> dict[str, float]:
    """The largest difference of each quantity, over all elements of this rank and several steps with changing weights,
    as a part of the largest element of what is expected."""
    layer_type = nn.BatchNorm2d if len(case.shape) == 2 else nn.BatchNorm1d
    # Weights are float32 beside bfloat16 images, as under autocast; what is expected is always found in float64.
    of_weights = torch.float64 if case.dtype == torch.float64 else torch.float32
    whole = layer_type(CHANNELS, momentum=case.momentum).double()
    sync = SyncBatchNorm.of(layer_type(CHANNELS, momentum=case.momentum).to(of_weights), by_ranks(gather))
    random = torch.Generator().manual_seed(1)
    start = sum(case.shards[: collectives.rank()])
    mine = slice(start, start + case.shards[collectives.rank()])
    found = dict.fromkeys(QUANTITIES, 0.0)

    def note(quantity: str, here: Tensor, there: Tensor) -> None:
        if here.numel():
            scale = there.abs().max().clamp(min=1e-3)
            found[quantity] = max(found[quantity], ((here.double() - there).abs().max() / scale).item())

    for _ in range(STEPS):
        weight, bias = (torch.randn(CHANNELS, generator=random) for _ in range(2))
        for layer in (whole, sync):
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(bias)
            layer.zero_grad()
        size = (sum(case.shards), CHANNELS, *case.shape)
        memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        # Far from zero mean, so that a difference of squares would lose digits.
        images, weights_of_loss = (
            (torch.randn(size, generator=random, dtype=torch.float64) * 2 + offset).to(case.dtype) for offset in (9, 0)
        )
        x_whole = images.to(torch.float64, copy=True).requires_grad_()
        y_whole = whole(x_whole)
        (y_whole * weights_of_loss.double()).sum().backward()
        x = images[mine].contiguous(memory_format=memory_format).requires_grad_()
        y = sync(x)
        (y * weights_of_loss[mine].contiguous(memory_format=memory_format)).sum().backward()

        assert y.dtype == case.dtype
        assert y.is_contiguous(memory_format=memory_format)
        note("output", y.detach(), y_whole.detach()[mine])
        note("input gradient", x.grad, x_whole.grad[mine])
        note("weight gradient", collectives.sum_over_ranks_(sync.weight.grad), whole.weight.grad)
        note("bias gradient", collectives.sum_over_ranks_(sync.bias.grad), whole.bias.grad)
        note("running mean", sync.running_mean, whole.running_mean)
        note("running variance", sync.running_var, whole.running_var)
        assert sync.num_batches_tracked == whole.num_batches_tracked
    for layer in (whole, sync):
        layer.eval()
    note("output", sync(images[mine]).detach(), whole(images[mine].double()).detach())
    return found


@pytest.fixture(scope="module")
def measured() -> Callable[[Case], dict[str, float]]:
    """The largest difference on any rank; the cases of a world size share its processes."""

    @once
    def of_world_size(world_size: int) -> list[dict[Case, dict[str, float]]]:
        return run_ranks(compare, world_size, [case for case in CASES if len(case.shards) == world_size])

    def of_case(case: Case) -> dict[str, float]:
        ranks = of_world_size(len(case.shards))
        return {quantity: max(rank[case][quantity] for rank in ranks) for quantity in QUANTITIES}

    return of_case


@pytest.mark.timeout(90)
@pytest.mark.parametrize("case", FLOAT64, ids=str)
def test_in_float64_shards_give_what_the_whole_batch_gives(
    measured: Callable[[Case], dict[str, float]], case: Case
) -> None:
    found = measured(case)
    print(found)
    assert {quantity: difference for quantity, difference in found.items() if difference > 1e-12} == {}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_in_bfloat16_values_are_off_by_its_rounding_and_statistics_by_that_of_float32(
    measured: Callable[[Case], dict[str, float]], case: Case
) -> None:
    found = measured(case)
    print(found)
    assert found["output"] < 2**-7
    assert found["input gradient"] < 2**-6
    assert found["weight gradient"] < 1e-4
    assert found["bias gradient"] < 1e-4
    assert found["running mean"] < 1e-5
    assert found["running variance"] < 1e-5
