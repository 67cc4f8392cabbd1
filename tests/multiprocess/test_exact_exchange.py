"""Gradients summed over shards have the bits of one tree, by any way, on any ranks, at any pace."""

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
WAYS = {"memory": SharedMemoryReduce, "group": AllReduce, "parts": ReduceScatter}
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
        given = f"-from-{str(self.of_gradients)[6:]}" if self.of_gradients else ""
        return f"{self.shards}-shards-{self.bucket_bytes}-bytes-{str(self.dtype)[6:]}{given}{layout}{large}"


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
    """Of one shard: known to every rank, since each of them is to know what all together should find."""
    seed = ((step * MICRO_STEPS + micro_step) * 64 + shard) * 64 + index
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(case.shapes[index], generator=generator, dtype=torch.float64)
    # Sums of a few numbers of bfloat16 would be exact in float32 if these were of one size.
    size = torch.exp2(torch.randint(-10, 11, case.shapes[index], generator=generator))
    made = (numbers * size).to(case.of_gradients or case.dtype)
    return made.contiguous(memory_format=torch.channels_last) if case.channels_last and made.dim() == 4 else made


def oracle(case: Case, leaves: list[Tensor]) -> Tensor:
    """The left half plus the right half; each addition rounds once, in the type of the weights."""
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


def reduction_of(case: Case, way: str) -> tuple[GradientReducer, list[Tensor]]:
    if way == "group":
        vars(bucket_reduce)["open_shared_memory"] = lambda size, device: None
    vars(gradient_reducer)["_FIRST_BUCKET_BYTES"] = case.bucket_bytes
    parameters = parameters_of(case)
    opener = BucketReduceOpener(timeout_seconds=30)
    sharded = way == "parts" and collectives.world_size() > 1
    parts = [BlockPartition(p, shards=case.shards).cut(p) for p in parameters] if sharded else None
    made = GradientReducer(
        parameters, shards=case.shards, bucket_bytes=case.bucket_bytes, open_exchange=opener, parts=parts
    )
    kind = WAYS[way] if collectives.world_size() > 1 else LocalReduce
    assert {type(bucket.exchange) for bucket in made._buckets} == {kind}
    assert len(made._buckets) == (len(case.shapes) if case.bucket_bytes == 1 else 1) or case.bucket_bytes == 300
    return made, parameters


def hand_over(summed: GradientReducer, case: Case, step: int, micro_step: int, pace: random.Random) -> None:
    """Each shard its gradients in about the order in which a backward pass finds them, two shards at a time."""

    def of_shard(shard: int) -> None:
        order = list(reversed(range(len(case.shapes))))
        for place in range(len(order) - 1):
            if pace.random() < 0.2:
                order[place], order[place + 1] = order[place + 1], order[place]
        for index in order:
            if pace.random() < 0.02:
                time.sleep(pace.choice((0.0002, 0.003)))
            summed.take(shard, index, gradient(case, step, micro_step, shard, index))

    shards = list(summed.own)
    pace.shuffle(shards)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(of_shard, shards))


def reduce_all(cases: list[Case], way: str) -> dict[Case, list[str]]:
    """What was wrong on this rank, for each case: after each step every gradient is compared with the oracle's."""
    pace = random.Random(collectives.rank())
    found = {}
    for case in cases:
        summed, parameters = reduction_of(case, way)
        found[case] = wrong = list[str]()
        for step in range(STEPS):
            micro_steps = 1 + (step + 2) % MICRO_STEPS
            for micro_step in range(micro_steps):
                hand_over(summed, case, step, micro_step, pace)
                summed.finish(last=micro_step == micro_steps - 1)
            for index, parameter in enumerate(parameters):
                there = expected(case, step, micro_steps, index)
                part = summed.parameters[index]
                if part is not parameter:
                    there = BlockPartition(parameter, shards=case.shards).cut(there)
                assert part.grad is not None
                if not torch.equal(part.grad, there):
                    wrong.append(f"step {step}, parameter {index}: bits")
                if part.grad.stride() != part.stride() or part.grad.dtype != case.dtype:
                    wrong.append(f"step {step}, parameter {index}: layout or type")
        # Views are kept of a few buffers that are used again and again, not of those of every step.
        kept = [len(bucket.lie._seen) for bucket in summed._buckets if isinstance(bucket.lie, ReplicatedBucket)]
        if any(count > 1 + len(summed._slots) for count in kept):
            wrong.append(f"views of {max(kept)} buffers are kept after {STEPS} steps")
    return found


def reduce_in_a_hurry(way: str) -> int:
    """Many small exchanges, some ranks late; the sum itself is checked while others may already write the next."""
    case = Case(8, bucket_bytes=1, shapes=((40,), (3,), LARGE))
    summed, _ = reduction_of(case, way)
    pace, wrong = random.Random(collectives.rank()), 0
    ones = [[torch.full(shape, float(shard + 1)) for shape in case.shapes] for shard in range(8)]
    for step in range(60):
        micro_steps = 1 + step % 3
        for micro_step in range(micro_steps):
            for shard in summed.own:
                for index in reversed(range(3)):
                    summed.take(shard, index, ones[shard][index] * (step + micro_step))
            if pace.random() < 0.1:
                time.sleep(pace.choice((0.0005, 0.004)))
            summed.finish(last=micro_step == micro_steps - 1)
        if pace.random() < 0.1:
            time.sleep(pace.choice((0.0005, 0.004)))
        total = 36.0 * sum(step + micro_step for micro_step in range(micro_steps))
        wrong += sum(not torch.equal(p.grad, torch.full_like(p, total)) for p in summed.parameters)
    return wrong


def leave_out_a_gradient(way: str) -> str:
    case = Case(8, shapes=((4,), (3,), (2,)))
    summed, _ = reduction_of(case, way)
    for shard in summed.own:
        for index in (2, 0):
            summed.take(shard, index, gradient(case, 0, 0, shard, index))
    try:
        summed.finish(last=True)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def gather_rows(way: str) -> dict[int, bool]:
    """The row of each shard from every rank, for several numbers of shards, lengths and dtypes."""
    rank, world_size = collectives.rank(), collectives.world_size()
    by_ranks = process_group_all_gather if way == "group" else open_all_gather(CPU, timeout_seconds=30)
    found = {}
    for shards in (8, 16, 64):
        rows_of_all = StatisticsGather(by_ranks if world_size > 1 else None, shards=shards)
        held = range(rank * shards // world_size, (rank + 1) * shards // world_size)
        found[shards] = True
        for exchanged in range(20):
            dtype = (torch.float32, torch.float64)[exchanged % 2]
            generator = torch.Generator().manual_seed(exchanged)
            rows = torch.randn(shards, 1 + 40 * exchanged, generator=generator, dtype=dtype)
            found[shards] &= torch.equal(rows_of_all([rows[shard] for shard in held]), rows)
    return found


@dataclass(frozen=True)
class Found:
    """What a rank found wrong with the sums of each case; how many sums were another's when it read them; whether it had
    the rows of so many shards; what it was told of a parameter without a gradient."""

    wrong: dict[Case, list[str]]
    overwritten: int
    rows: dict[int, bool]
    told: str


@in_group
def try_everything(way: str) -> Found:
    cases = [case for case in CASES if case.shards >= collectives.world_size()]
    return Found(reduce_all(cases, way), reduce_in_a_hurry(way), gather_rows(way), leave_out_a_gradient(way))


@pytest.fixture(scope="module")
def found() -> Callable[[int, str], list[Found]]:
    """(world_size, way) -> what each rank found; starting ranks takes longer than all that they do."""
    return once(lambda world_size, way: run_ranks(try_everything, world_size, way, timeout_seconds=100))


everywhere = pytest.mark.parametrize(
    ("world_size", "way"),
    [(1, "memory"), (2, "group"), (3, "memory"), (3, "group"), (6, "memory"), (3, "parts"), (4, "parts")],
)
Finder = Callable[[int, str], list[Found]]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES, ids=str)
@everywhere
def test_the_sum_over_shards_has_the_bits_of_the_tree(found: Finder, world_size: int, way: str, case: Case) -> None:
    assert [rank.wrong[case] for rank in found(world_size, way)] == [[]] * world_size


@pytest.mark.timeout(120)
@everywhere
def test_nobody_writes_what_another_still_reads(found: Finder, world_size: int, way: str) -> None:
    assert [rank.overwritten for rank in found(world_size, way)] == [0] * world_size


@pytest.mark.timeout(120)
@everywhere
def test_every_rank_has_the_rows_of_all_shards_in_their_order(found: Finder, world_size: int, way: str) -> None:
    assert [rank.rows for rank in found(world_size, way)] == [{8: True, 16: True, 64: True}] * world_size


@pytest.mark.timeout(120)
@everywhere
def test_a_parameter_without_a_gradient_is_told_on_every_rank(found: Finder, world_size: int, way: str) -> None:
    for rank in found(world_size, way):
        assert "gradients did not come: exact mode needs every parameter" in rank.told


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sum_from_left_to_right_or_rank_by_rank_has_other_bits(case: Case) -> None:
    """Were it not so, the test above could not fail."""
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
def lose_a_peer(way: str) -> str | None:
    case = Case(8, shapes=((4,), (3,), (2,)))
    summed, _ = reduction_of(case, way)
    for step in range(3):
        if step == 2 and collectives.rank() == 1:
            leave()
        hand_over(summed, case, step, 0, random.Random(0))
        try:
            summed.finish(last=True)
        except RuntimeError as error:
            return str(error)
    return "nothing was raised"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", list(WAYS))
def test_a_lost_peer_is_told(way: str) -> None:
    found = run_ranks(lose_a_peer, 3, way)
    assert found.pop(1) is None
    for message in found:
        assert "onnection" in message
        assert "nothing was raised" not in message
