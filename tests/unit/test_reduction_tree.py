"""The reduction tree against an oracle that adds float32 numbers in Python, in the order that defines the tree."""

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed.comm.reduction_tree import Node, covering_subtrees, reduce_to_root, shard_range, tree_sum

SIZES = [1, 2, 4, 8, 16, 64]
PLACES = [(leaves, world_size) for leaves in SIZES for world_size in range(1, leaves + 1)]


def oracle(numbers: Sequence[np.float32]) -> np.float32:
    """Return the sum of the left half plus the sum of the right half."""
    if len(numbers) == 1:
        return numbers[0]
    half = len(numbers) // 2
    return np.float32(oracle(numbers[:half]) + oracle(numbers[half:]))


def rows_of(leaves: int, length: int = 100, seed: int = 0) -> Tensor:
    """Return rows of different magnitudes and both signs, so that the order of summation changes the bits."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-3, 4, (leaves, length), generator=generator).float())
    return torch.randn(leaves, length, generator=generator) * size


def oracles(rows: Tensor) -> Tensor:
    columns = rows.numpy().T
    return torch.tensor([oracle(list(column)) for column in columns])


def leaves_in(node: Node) -> list[int]:
    return list(range(node.first, node.first + node.size))


def node_sums(rows: Tensor, world_size: int) -> dict[Node, Tensor]:
    """Return the oracle's sums of the covering subtrees of all ranks."""
    nodes = [node for rank in range(world_size) for node in covering_subtrees(shard_range(rank, world_size, len(rows)))]
    return {node: oracles(rows[node.first : node.first + node.size]) for node in nodes}


@pytest.mark.parametrize(("leaves", "world_size"), PLACES)
def test_shard_ranges_partition_the_shards_evenly(leaves: int, world_size: int) -> None:
    ranges = [shard_range(rank, world_size, leaves) for rank in range(world_size)]
    assert [leaf for own in ranges for leaf in own] == list(range(leaves))
    assert min(map(len, ranges)) >= 1
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def fewest(start: int, stop: int) -> int:
    """Return the minimum number of aligned powers of two that make up a range, by dynamic programming."""
    best = {stop: 0}
    for first in reversed(range(start, stop)):
        sizes = [1 << k for k in range(8) if first % (1 << k) == 0 and first + (1 << k) <= stop]
        best[first] = 1 + min(best[first + size] for size in sizes)
    return best[start]


def check_nodes(leaves: range) -> None:
    nodes = covering_subtrees(leaves)
    assert [leaf for node in nodes for leaf in leaves_in(node)] == list(leaves), "they partition the leaves, in order"
    for node in nodes:
        assert node.size & (node.size - 1) == 0, "a power of two"
        assert node.first % node.size == 0, "aligned"
    assert len(nodes) == fewest(leaves.start, leaves.stop)


@pytest.mark.parametrize(("leaves", "world_size"), PLACES)
def test_fewest_subtrees_cover_each_rank(leaves: int, world_size: int) -> None:
    for rank in range(world_size):
        check_nodes(shard_range(rank, world_size, leaves))


def test_fewest_subtrees_cover_any_range() -> None:
    for start in range(33):
        for stop in range(start, 33):
            check_nodes(range(start, stop))


def test_siblings_and_parents_up_to_the_root() -> None:
    assert (Node(4, 2).sibling, Node(6, 2).sibling) == (Node(6, 2), Node(4, 2))
    assert Node(4, 2).parent == Node(6, 2).parent == Node(4, 4)
    for leaf in range(64):
        node = Node(leaf, 1)
        while node.size < 64:
            assert node.sibling.sibling == node
            assert node.sibling.parent == node.parent
            assert leaves_in(node.parent) == sorted(leaves_in(node) + leaves_in(node.sibling))
            node = node.parent
        assert node == Node(0, 64)


@pytest.mark.parametrize(("leaves", "world_size"), PLACES)
def test_root_is_bit_identical_for_any_world_size(leaves: int, world_size: int) -> None:
    rows = rows_of(leaves, length=40, seed=leaves)
    assert torch.equal(reduce_to_root(node_sums(rows, world_size)), oracles(rows))


def test_root_ignores_order_and_leaves_its_input_alone() -> None:
    rows = rows_of(16)
    sums = node_sums(rows, 5)
    before = {node: tensor.clone() for node, tensor in sums.items()}
    backwards = dict(reversed(sums.items()))
    assert torch.equal(reduce_to_root(backwards), reduce_to_root(sums))
    assert list(backwards) == list(reversed(before))
    assert all(torch.equal(sums[node], before[node]) for node in before)


def test_root_of_a_single_node() -> None:
    row = torch.tensor([1.5, -2.0])
    assert torch.equal(reduce_to_root({Node(0, 8): row}), row)


@pytest.mark.parametrize("leaves", SIZES)
def test_tree_sum_matches_the_oracle(leaves: int) -> None:
    rows = rows_of(leaves, seed=1)
    before = rows.clone()
    assert torch.equal(tree_sum(rows), oracles(rows))
    assert torch.equal(rows, before)
    assert torch.equal(tree_sum(rows.view(leaves, 4, 25)), oracles(rows).view(4, 25))
    assert torch.equal(torch.from_numpy(tree_sum(rows.numpy())), oracles(rows))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("count", [3, 5, 6, 7, 11])
def test_an_odd_row_moves_up_unchanged(count: int) -> None:
    def sum_in_pairs(numbers: list[np.float32]) -> np.float32:
        while len(numbers) > 1:
            odd = numbers[len(numbers) // 2 * 2 :]
            numbers = [np.float32(a + b) for a, b in zip(numbers[::2], numbers[1::2], strict=False)] + odd
        return numbers[0]

    rows = rows_of(count)
    expected = torch.tensor([sum_in_pairs(list(column)) for column in rows.numpy().T])
    assert torch.equal(tree_sum(rows), expected)
    assert torch.equal(torch.from_numpy(tree_sum(rows.numpy())), expected)


@pytest.mark.parametrize("leaves", SIZES)
def test_rounding_error_is_bounded_by_the_tree_height(leaves: int) -> None:
    """Higham, Accuracy and Stability of Numerical Algorithms, 4.2: |error| <= height * u / (1 - height * u) * sum |x|."""
    rows = rows_of(leaves, seed=2)
    height, unit = Fraction(leaves.bit_length() - 1), Fraction(1, 2**24)
    bound = height * unit / (1 - height * unit)
    errors = []
    for column, found in zip(rows.T.tolist(), tree_sum(rows).tolist(), strict=True):
        exact = sum(map(Fraction, column))
        size = sum(abs(Fraction(x)) for x in column)
        assert abs(Fraction(found) - exact) <= bound * size
        errors.append(abs(Fraction(found) - exact))
    assert leaves < 4 or any(errors), "no rounding occurred, so the test proves nothing"


@pytest.mark.parametrize("leaves", [size for size in SIZES if size >= 4])
def test_another_order_of_summation_has_other_bits(leaves: int) -> None:
    """Negative control: otherwise no test in this file could fail."""
    rows = rows_of(leaves)
    in_order = reduce(torch.add, rows)
    differing = (in_order != tree_sum(rows)).double().mean().item()
    assert differing > 0.1
    assert (rows.sum(0) != tree_sum(rows)).any()
    if leaves >= 8:
        ranks = [rows[own.start : own.stop].sum(0) for own in (shard_range(rank, 3, leaves) for rank in range(3))]
        assert (reduce(torch.add, ranks) != tree_sum(rows)).any(), "the sum of three ranks' sums"
