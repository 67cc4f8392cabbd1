"""Gradients summed over shards are bit-identical to one tree, with any transport, world size and timing."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce

import pytest
import torch
from kit.ranks import in_group, leave, once, run_ranks
from torch import Tensor

from distributed.comm import collectives
from distributed.comm.all_gather import open_all_gather, process_group_all_gather
from distributed.exact import bucket_reduce, gradient_reducer
from distributed.exact.bucket_layout import ReplicatedBucket
from distributed.exact.bucket_reduce import (
    AllReduce,
    BucketReduceOpener,
    LocalReduce,
    ReduceScatter,
    SharedMemoryReduce,
)
from distributed.exact.gather_statistics import StatisticsGather
from distributed.exact.gradient_reducer import GradientReducer
from distributed.exact.partition import BlockPartition

CPU = torch.device("cpu")
STEPS, MICRO_STEPS = 3, 3
MIB = 2**20
TRANSPORTS = {"memory": SharedMemoryReduce, "group": AllReduce, "sharded": ReduceScatter}
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (5, 7), (8, 3, 3, 3), (6, 1, 3, 3), (1, 1), (), (130,))
LARGE = (60, 50)


@dataclass(frozen=True)
class Case:
    shards: int
    bucket_bytes: int = MIB
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    dtype: torch.dtype = torch.float32
    of_gradients: torch.dtype | None = None
    channels_last: bool = False

    def __str__(self) -> str:
        layout = "-channels_last" if self.channels_last else ""
        large = "-large" if LARGE in self.shapes else ""
        source = f"-from-{str(self.of_gradients)[6:]}" if self.of_gradients else ""
        return f"{self.shards}-shards-{self.bucket_bytes}-bytes-{str(self.dtype)[6:]}{source}{layout}{large}"


CASES = [
    *(Case(shards, channels_last=bool(shards % 3)) for shards in (8, 16, 32)),
    Case(8, bucket_bytes=1, shapes=(*SHAPES, LARGE), channels_last=True),
    Case(8, bucket_bytes=300, shapes=(*SHAPES, LARGE)),
    Case(8, dtype=torch.float64),
    Case(8, of_gradients=torch.bfloat16, channels_last=True),
    Case(16, bucket_bytes=1, shapes=((1,), LARGE)),
    Case(8, shapes=((1,),)),
]


def parameters_of(case: Case) -> list[Tensor]:
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return [
        torch.zeros(shape, dtype=case.dtype).contiguous(
            memory_format=layout if len(shape) == 4 else torch.preserve_format
        )
        for shape in case.shapes
    ]


def gradient(case: Case, step: int, micro_step: int, shard: int, index: int) -> Tensor:
    """Return one shard's gradient. Seeded, so that every rank can compute the expected sum."""
    seed = ((step * MICRO_STEPS + micro_step) * 64 + shard) * 64 + index
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(case.shapes[index], generator=generator, dtype=torch.float64)
    # Different magnitudes: float32 sums of a few bfloat16 numbers of similar magnitude would be exact.
    size = torch.exp2(torch.randint(-10, 11, case.shapes[index], generator=generator))
    made = (numbers * size).to(case.of_gradients or case.dtype)
    return made.contiguous(memory_format=torch.channels_last) if case.channels_last and made.dim() == 4 else made


def oracle(case: Case, leaves: list[Tensor]) -> Tensor:
    """Return the left half plus the right half; each addition rounds once, in the dtype of the weights."""
    if len(leaves) == 1:
        return leaves[0].to(case.dtype)
    half = len(leaves) // 2
    return oracle(case, leaves[:half]) + oracle(case, leaves[half:])


def expected(case: Case, step: int, micro_steps: int, index: int) -> Tensor:
    sums = [
        oracle(case, [gradient(case, step, micro, shard, index) for shard in range(case.shards)])
        for micro in range(micro_steps)
    ]
    return reduce(torch.add, sums)


def reducer_of(case: Case, transport: str) -> tuple[GradientReducer, list[Tensor]]:
    if transport == "group":
        vars(bucket_reduce)["open_shared_memory"] = lambda size, device: None
    vars(gradient_reducer)["_FIRST_BUCKET_BYTES"] = case.bucket_bytes
    parameters = parameters_of(case)
    opener = BucketReduceOpener(timeout_seconds=30)
    sharded = transport == "sharded" and collectives.world_size() > 1
    local = [BlockPartition(p, shards=case.shards).local_part(p) for p in parameters] if sharded else None
    reducer = GradientReducer(
        parameters, shards=case.shards, bucket_bytes=case.bucket_bytes, open_bucket_reduce=opener, local=local
    )
    kind = TRANSPORTS[transport] if collectives.world_size() > 1 else LocalReduce
    assert {type(bucket.reduce) for bucket in reducer._buckets} == {kind}
    assert len(reducer._buckets) == (len(case.shapes) if case.bucket_bytes == 1 else 1) or case.bucket_bytes == 300
    return reducer, parameters


def add_gradients(reducer: GradientReducer, case: Case, step: int, micro_step: int, timing: random.Random) -> None:
    """Add each shard's gradients roughly in the order of a backward pass, two shards at a time; in odd steps in groups."""
    if step % 2:
        add_in_groups(reducer, case, step, micro_step, timing)
        return

    def of_shard(shard: int) -> None:
        order = list(reversed(range(len(case.shapes))))
        for position in range(len(order) - 1):
            if timing.random() < 0.2:
                order[position], order[position + 1] = order[position + 1], order[position]
        for index in order:
            if timing.random() < 0.02:
                time.sleep(timing.choice((0.0002, 0.003)))
            reducer.add_gradient(shard, index, gradient(case, step, micro_step, shard, index))

    shards = list(reducer.own_shards)
    timing.shuffle(shards)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(of_shard, shards))


def add_in_groups(reducer: GradientReducer, case: Case, step: int, micro_step: int, timing: random.Random) -> None:
    """Add the gradients of two groups of shards, a few parameters at a time."""
    own = reducer.own_shards
    middle = own.start + timing.randint(0, len(own))

    def of_group(shards: range) -> None:
        for indices in (range(0, len(case.shapes), 2), range(1, len(case.shapes), 2)):
            if len(shards) and len(indices):
                found = {i: [gradient(case, step, micro_step, shard, i) for shard in shards] for i in indices}
                reducer.add_gradients(shards, found)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(of_group, [range(own.start, middle), range(middle, own.stop)]))


def reduce_all(cases: list[Case], transport: str) -> dict[Case, list[str]]:
    """Compare every gradient with the oracle's after each step; return what was wrong on this rank, by case."""
    timing = random.Random(collectives.rank())
    found = {}
    for case in cases:
        reducer, parameters = reducer_of(case, transport)
        found[case] = wrong = list[str]()
        for step in range(STEPS):
            micro_steps = 1 + (step + 2) % MICRO_STEPS
            for micro_step in range(micro_steps):
                add_gradients(reducer, case, step, micro_step, timing)
                reducer.finish_micro_step(last=micro_step == micro_steps - 1)
            for index, parameter in enumerate(parameters):
                total = expected(case, step, micro_steps, index)
                local = reducer.parameters[index]
                if local is not parameter:
                    total = BlockPartition(parameter, shards=case.shards).local_part(total)
                assert local.grad is not None
                if not torch.equal(local.grad, total):
                    wrong.append(f"step {step}, parameter {index}: bits")
                if local.grad.stride() != local.stride() or local.grad.dtype != case.dtype:
                    wrong.append(f"step {step}, parameter {index}: layout or dtype")
        # Views are cached for a few buffers that are reused, not for new ones in every step.
        layouts = [bucket.layout for bucket in reducer._buckets]
        cached = [len(layout._views_of_buffer) for layout in layouts if isinstance(layout, ReplicatedBucket)]
        if any(count > 1 + len(reducer._slots) for count in cached):
            wrong.append(f"views of {max(cached)} buffers are cached after {STEPS} steps")
    return found


def reduce_in_quick_succession(transport: str) -> int:
    """Count wrong sums over many small reductions with late ranks; while one rank checks, others may write the next sums."""
    case = Case(8, bucket_bytes=1, shapes=((40,), (3,), LARGE))
    reducer, _ = reducer_of(case, transport)
    timing, wrong = random.Random(collectives.rank()), 0
    ones = [[torch.full(shape, float(shard + 1)) for shape in case.shapes] for shard in range(8)]
    for step in range(60):
        micro_steps = 1 + step % 3
        for micro_step in range(micro_steps):
            for shard in reducer.own_shards:
                for index in reversed(range(3)):
                    reducer.add_gradient(shard, index, ones[shard][index] * (step + micro_step))
            if timing.random() < 0.1:
                time.sleep(timing.choice((0.0005, 0.004)))
            reducer.finish_micro_step(last=micro_step == micro_steps - 1)
        if timing.random() < 0.1:
            time.sleep(timing.choice((0.0005, 0.004)))
        total = 36.0 * sum(step + micro_step for micro_step in range(micro_steps))
        wrong += sum(not torch.equal(p.grad, torch.full_like(p, total)) for p in reducer.parameters)
    return wrong


def gather_rows(transport: str) -> dict[int, bool]:
    """Gather statistics rows for several shard counts, lengths and dtypes; return whether they were correct, by count."""
    rank, world_size = collectives.rank(), collectives.world_size()
    gather = process_group_all_gather if transport == "group" else open_all_gather(CPU, timeout_seconds=30)
    found = {}
    for shards in (8, 16, 64):
        rows_of_all = StatisticsGather(gather if world_size > 1 else None, shards=shards)
        own = range(rank * shards // world_size, (rank + 1) * shards // world_size)
        found[shards] = True
        for attempt in range(20):
            dtype = (torch.float32, torch.float64)[attempt % 2]
            generator = torch.Generator().manual_seed(attempt)
            rows = torch.randn(shards, 1 + 40 * attempt, generator=generator, dtype=dtype)
            found[shards] &= torch.equal(rows_of_all([rows[shard] for shard in own]), rows)
    return found


@dataclass(frozen=True)
class Found:
    """Results of one rank."""

    wrong: dict[Case, list[str]]
    """Differences from the expected sums, by case."""
    overwritten: int
    """How many sums were overwritten before they were read."""
    rows: dict[int, bool]
    """Whether statistics rows were correct, by number of shards."""


@in_group
def run_all(transport: str) -> Found:
    cases = [case for case in CASES if case.shards >= collectives.world_size()]
    return Found(
        reduce_all(cases, transport),
        reduce_in_quick_succession(transport),
        gather_rows(transport),
    )


@pytest.fixture(scope="module")
def found() -> Callable[[int, str], list[Found]]:
    """Return a cached function from (world_size, transport) to each rank's results; starting ranks is the slow part."""
    return once(lambda world_size, transport: run_ranks(run_all, world_size, transport, timeout_seconds=100))


everywhere = pytest.mark.parametrize(
    ("world_size", "transport"),
    [(1, "memory"), (2, "group"), (3, "memory"), (3, "group"), (6, "memory"), (3, "sharded"), (4, "sharded")],
)
Finder = Callable[[int, str], list[Found]]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES, ids=str)
@everywhere
def test_sums_are_bit_identical_to_the_tree(found: Finder, world_size: int, transport: str, case: Case) -> None:
    assert [rank.wrong[case] for rank in found(world_size, transport)] == [[]] * world_size


@pytest.mark.timeout(120)
@everywhere
def test_no_rank_overwrites_sums_that_others_read(found: Finder, world_size: int, transport: str) -> None:
    assert [rank.overwritten for rank in found(world_size, transport)] == [0] * world_size


@pytest.mark.timeout(120)
@everywhere
def test_every_rank_gathers_all_rows_in_order(found: Finder, world_size: int, transport: str) -> None:
    assert [rank.rows for rank in found(world_size, transport)] == [{8: True, 16: True, 64: True}] * world_size


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_different_summation_order_changes_bits(case: Case) -> None:
    """Negative control for test_sums_are_bit_identical_to_the_tree."""
    index = max(range(len(case.shapes)), key=lambda i: torch.Size(case.shapes[i]).numel())
    different = 0
    for step in range(20):
        leaves = [gradient(case, step, 0, shard, index).to(case.dtype) for shard in range(case.shards)]
        tree = oracle(case, leaves)
        different += not torch.equal(reduce(torch.add, leaves), tree)
        thirds = [leaves[rank * case.shards // 3 : (rank + 1) * case.shards // 3] for rank in range(3)]
        different += not torch.equal(reduce(torch.add, [reduce(torch.add, third) for third in thirds]), tree)
    assert different > 5


@in_group
def lose_a_peer(transport: str) -> str | None:
    case = Case(8, shapes=((4,), (3,), (2,)))
    reducer, _ = reducer_of(case, transport)
    for step in range(3):
        if step == 2 and collectives.rank() == 1:
            leave()
        add_gradients(reducer, case, step, 0, random.Random(0))
        try:
            reducer.finish_micro_step(last=True)
        except RuntimeError as error:
            return str(error)
    return "nothing was raised"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", list(TRANSPORTS))
def test_a_lost_peer_raises_an_error(transport: str) -> None:
    found = run_ranks(lose_a_peer, 3, transport)
    assert found.pop(1) is None
    for message in found:
        assert "onnection" in message
        assert "nothing was raised" not in message
