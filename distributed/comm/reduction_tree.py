"""Sums in one fixed binary tree over S leaves, S a power of two: the same bits whoever holds which leaves.

A sum of floating-point numbers depends on its order. Here the order is that of the tree alone: leaf 2i with leaf 2i + 1,
the results again in pairs, up to the root. Who holds a run of leaves adds up the largest whole subtrees inside it; whoever
has all of those finishes the tree.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Node(NamedTuple):
    """A subtree: leaves `first` to `first + size`, `size` a power of two that divides `first`."""

    first: int
    size: int

    @property
    def sibling(self) -> "Node":
        return Node(self.first ^ self.size, self.size)

    @property
    def parent(self) -> "Node":
        return Node(self.first & ~self.size, 2 * self.size)


def shard_range(rank: int, world_size: int, leaves: int) -> range:
    """The leaves that a rank holds: a run of them, none for nobody while world_size <= leaves."""
    return range(rank * leaves // world_size, (rank + 1) * leaves // world_size)


def covering_subtrees(held: range) -> list[Node]:
    """The fewest subtrees that make up a run of leaves: one where an aligned power of two is held, a few otherwise."""
    nodes, first = [], held.start
    while first < held.stop:
        size = first & -first or 1 << (held.stop - first).bit_length()
        while first + size > held.stop:
            size //= 2
        nodes.append(Node(first, size))
        first += size
    return nodes


def reduce_to_root(sums: Mapping[Node, Tensor]) -> Tensor:
    """The whole tree's sum from the sums of subtrees that make it up."""
    waiting = dict(sums)
    while len(waiting) > 1:
        least = min(node.size for node in waiting)
        for node in [node for node in waiting if node.size == least and not node.first & least]:
            waiting[node.parent] = waiting.pop(node) + waiting.pop(node.sibling)
    return next(iter(waiting.values()))


def tree_sum(rows: Tensor) -> Tensor:
    """The sum of rows [n, ...] -> [...] in the tree; where n is no power of two, an odd one is carried up."""
    while len(rows) > 1:
        even = len(rows) // 2 * 2
        paired = rows[0:even:2] + rows[1:even:2]
        rows = torch.cat([paired, rows[even:]]) if even < len(rows) else paired
    return rows[0]
