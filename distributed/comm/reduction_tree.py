"""Sums in one fixed binary tree over S leaves, S a power of two: bit-identical however the leaves are split over ranks.

The result of a floating-point sum depends on its order. Here the tree alone defines the order: leaf 2i is added to leaf
2i + 1, the results are added in pairs, and so on up to the root. A rank with a contiguous range of leaves sums the largest
complete subtrees inside it; a rank that has received all of those finishes the tree.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = TypeVar("Rows", Tensor, NDArray[Any])


class Node(NamedTuple):
    """The subtree of leaves `first` to `first + size`, where `size` is a power of two that divides `first`."""

    first: int
    size: int

    @property
    def sibling(self) -> "Node":
        return Node(self.first ^ self.size, self.size)

    @property
    def parent(self) -> "Node":
        return Node(self.first & ~self.size, 2 * self.size)


def shard_range(rank: int, world_size: int, shards: int) -> range:
    """Return the contiguous shards of a rank; never empty while world_size <= shards."""
    return range(rank * shards // world_size, (rank + 1) * shards // world_size)


def covering_subtrees(leaves: range) -> list[Node]:
    """Return the fewest subtrees that make up a range of leaves: one if it is an aligned power of two, else a few."""
    nodes, first = [], leaves.start
    while first < leaves.stop:
        size = first & -first or 1 << (leaves.stop - first).bit_length()
        while first + size > leaves.stop:
            size //= 2
        nodes.append(Node(first, size))
        first += size
    return nodes


def reduce_to_root(sums: Mapping[Node, Tensor], *, out: Tensor | None = None) -> Tensor:
    """Return the sum over the entire tree, given the sums of subtrees that cover it.

    Args:
        out: where to write it, which saves a copy if there are several subtrees.
    """
    remaining = dict(sums)
    while len(remaining) > 1:
        smallest = min(node.size for node in remaining)
        for node in [node for node in remaining if node.size == smallest and not node.first & smallest]:
            of_root = out if len(remaining) == 2 else None
            remaining[node.parent] = torch.add(remaining.pop(node), remaining.pop(node.sibling), out=of_root)
    (root,) = remaining.values()
    return root if out is None or root is out else out.copy_(root)


def tree_sum(rows: Rows) -> Rows:
    """Sum rows [n, ...] -> [...] in the tree. If n is odd at some level, the last row moves up unchanged."""
    while (count := len(rows)) > 1:
        paired = rows[: count - 1 : 2] + rows[1::2]
        if count % 2:
            paired = _joined(paired, rows[-1:])
        rows = paired
    root: Rows = rows[0]
    return root


def _joined(above: Rows, below: Rows) -> Rows:
    return torch.cat([above, below]) if isinstance(above, Tensor) else np.concatenate([above, below])
