"""Where exact mode's weights lie: norms are added up block by block, in one order whoever has which blocks."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from distributed.comm.collectives import rank, world_size
from distributed.comm.reduction_tree import shard_range
from distributed.engine.model_state import ReplicatedLayout
from distributed.engine.sharding import LocalTensor, Replicated
from distributed.exact.partition import BlockPartition, squares_of_blocks
from distributed.exact.sharded_weights import ShardedWeights


class BlockReplicatedLayout(ReplicatedLayout):
    """A `Layout`: every rank has everything."""

    def __init__(self, model: nn.Module, *, shards: int) -> None:
        self._shards = shards
        self._blocks = [BlockPartition(p, shards=shards) for p in model.parameters() if p.requires_grad]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        flat = [cut.flat(gradient) for cut, gradient in zip(self._blocks, gradients, strict=True)]
        return squares_of_blocks(flat, self._blocks, shards=self._shards, first=0).sum().sqrt()


class BlockShardedLayout:
    """A `Layout`: a rank has its runs of blocks; buffers are whole."""

    def __init__(self, weights: ShardedWeights, model: nn.Module, *, shards: int) -> None:
        self._weights, self._shards = weights, shards
        self._blocks = [weights.blocks[name] for name, p in model.named_parameters() if p.requires_grad]

    def held(self, name: str, tensor: Tensor) -> LocalTensor:
        if name in self._weights.parts:
            return LocalTensor(self._weights.parts[name], self._weights.blocks[name])
        return LocalTensor(tensor, Replicated(tensor.shape))

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        gradient = self._weights.parts[name].grad
        assert gradient is not None
        return gradient

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        first = shard_range(rank(), world_size(), self._shards).start
        squares = squares_of_blocks(gradients, self._blocks, shards=self._shards, first=first)
        dist.all_reduce(squares)  # each number is zero but on one rank, so no order of sums rounds
        return squares.sum().sqrt()
