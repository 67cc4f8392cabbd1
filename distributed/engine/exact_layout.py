"""How exact mode distributes weights. Norms are summed block by block in one order, whichever rank has which blocks."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from distributed.comm.collectives import rank, world_size
from distributed.comm.reduction_tree import shard_range
from distributed.engine.model_state import ReplicatedLayout
from distributed.engine.sharding import LocalTensor, Replicated
from distributed.exact.partition import BlockPartition, squared_norms_of_blocks
from distributed.exact.sharded_weights import ShardedWeights


class BlockReplicatedLayout(ReplicatedLayout):
    """Every rank has all blocks: a `Layout`."""

    def __init__(self, model: nn.Module, *, shards: int) -> None:
        self._shards = shards
        self._partitions = [BlockPartition(p, shards=shards) for p in model.parameters() if p.requires_grad]

    def global_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        flat = [partition.flat(g) for partition, g in zip(self._partitions, gradients, strict=True)]
        return squared_norms_of_blocks(flat, self._partitions, shards=self._shards, first=0).sum().sqrt()


class BlockShardedLayout:
    """Each rank has a contiguous range of the blocks of every parameter, and full buffers: a `Layout`."""

    def __init__(self, weights: ShardedWeights, model: nn.Module, *, shards: int) -> None:
        self._weights, self._shards = weights, shards
        self._partitions = [weights.partitions[name] for name, p in model.named_parameters() if p.requires_grad]
        first_names = {id(p): name for name, p in model.named_parameters()}
        self._first_names = {name: first_names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}

    def local_tensor(self, name: str, tensor: Tensor) -> LocalTensor:
        if name := self._first_names.get(name, ""):  # a tied parameter has several names
            return LocalTensor(self._weights.local[name], self._weights.partitions[name])
        return LocalTensor(tensor, Replicated(tensor.shape))

    def local_gradient(self, name: str, parameter: Tensor) -> Tensor:
        gradient = self._weights.local[name].grad
        assert gradient is not None
        return gradient

    def global_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        first = shard_range(rank(), world_size(), self._shards).start
        squares = squared_norms_of_blocks(gradients, self._partitions, shards=self._shards, first=first)
        # Every element is zero on all ranks but one, so the order of summation does not matter.
        dist.all_reduce(squares)
        return squares.sum().sqrt()
