"""Exact mode: bit-identical results on any number of ranks, with replicated or sharded weights.

The batch is split into a fixed number of shards. Each passes through its own replica of the model, on one thread. Everything
that is summed over the batch, i.e. gradients and batch-norm statistics, is summed over shards in a fixed tree.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from distributed.comm.all_gather import open_all_gather
from distributed.comm.collectives import world_size
from distributed.config.engines import Ddp, Fsdp
from distributed.config.sections import AdamW, Sgd
from distributed.data.batch import Batch
from distributed.engine.exact_layout import BlockReplicatedLayout, BlockShardedLayout
from distributed.engine.model_state import Layout, ModelState
from distributed.engine.prepare import Compute, cast
from distributed.engine.protocol import Loss, Outcome
from distributed.exact.batch_norm import GraphSplit, SplittingBatchNorm, backward
from distributed.exact.bucket_reduce import BucketReduceOpener
from distributed.exact.gather_statistics import StatisticsGather
from distributed.exact.gradient_reducer import GradientReducer
from distributed.exact.replicas import Replicas
from distributed.exact.shard_executor import ShardExecutor
from distributed.exact.sharded_weights import ShardedWeights
from distributed.exact.supported import check_exact
from distributed.models.sync_batch_norm import convert_batch_norm


class ExactEngine:
    """An `Engine` in exact mode.

    Args:
        model: float32 on the CPU, with its initial weights; the engine takes ownership.
        shards: number of shards of the global batch, a power of two, at least world_size.
        workers: number of this rank's shards that compute at the same time.

    Raises:
        ValueError: a layer of the model cannot be computed shard by shard.
    """

    def __init__(
        self,
        config: Ddp | Fsdp,
        model: nn.Module,
        *,
        optim: Sgd | AdamW,
        compute: Compute,
        shards: int,
        workers: int,
    ) -> None:
        self.compute, timeout = compute, compute.timeout_seconds
        check_exact(model)
        self._plain = cast(model, compute)
        gather = open_all_gather(compute.device, timeout_seconds=timeout) if world_size() > 1 else None
        parameters = [p for p in self._plain.parameters() if p.requires_grad]
        low = compute.low_dtype
        self._sharded: ShardedWeights | None = None
        if isinstance(config, Fsdp) and world_size() > 1:
            reshard = config.reshard_after_forward
            self._sharded = ShardedWeights(self._plain, shards=shards, low=low, reshard_after_forward=reshard)
        self._reducer = GradientReducer(
            parameters,
            shards=shards,
            bucket_bytes=config.bucket_mib * 2**20 if isinstance(config, Ddp) else 2**20,
            open_bucket_reduce=BucketReduceOpener(timeout_seconds=timeout),
            local=list(self._sharded.local.values()) if self._sharded else None,
        )
        own_shards = self._reducer.own_shards
        gather_rows = StatisticsGather(gather, shards=shards)
        # Sharded weights are gathered on the first shard's stream, and other streams would not wait for it.
        self._executor = ShardExecutor(
            len(own_shards), workers=workers, gather=partial(_synchronize, self._reducer, gather_rows),
            device=compute.device, own_streams=self._sharded is None,
        )  # fmt: skip
        self._replicas = Replicas(
            self._plain, len(own_shards), low=low, gathered=self._sharded.gathered if self._sharded else None
        )
        self._splits: list[list[GraphSplit]] = [[] for _ in own_shards]
        for local_shard, replica in enumerate(self._replicas.models):
            all_gather_rows = partial(self._executor.all_gather_rows, local_shard)
            splits = self._splits[local_shard]
            convert_batch_norm(
                replica, partial(SplittingBatchNorm.splitting, all_gather_rows=all_gather_rows, splits=splits)
            )
            for index, parameter in enumerate(p for p in replica.parameters() if p.requires_grad):
                hook = partial(_hand_over_gradient, self._reducer, own_shards[local_shard], index)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            if self._sharded:
                self._sharded.attach(replica, len(own_shards))
        self.model: nn.Module = self._replicas.models
        layout: Layout = BlockReplicatedLayout(self._plain, shards=shards)
        if self._sharded:
            layout = BlockShardedLayout(self._sharded, self._plain, shards=shards)
        self.weights = ModelState(optim, self._plain, precision=compute.precision, layout=layout)
        # Operations on all of a rank's weights, e.g. norms, must not depend on its number of threads either.
        torch.set_num_threads(1)

    def predict(self, batch: Batch) -> Tensor:
        shards = batch.shards()

        def forward(local_shard: int) -> Tensor:
            shard = shards[local_shard]
            with torch.no_grad(), self.compute.autocast():  # both are set per thread
                logits: Tensor = self._replicas.models[local_shard](shard.images, shard.sample_keys)
                return logits

        with self._computing():
            return torch.cat(self._executor.run(forward))

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        shards = batch.shards()

        def forward_backward(local_shard: int) -> Outcome:
            with self.compute.autocast():
                value, outcome = loss(self._replicas.models[local_shard], shards[local_shard])
            if self._sharded:  # a barrier: no backward pass starts before all forward passes have finished
                self._executor.all_gather_rows(local_shard, value.detach().view(1), lambda rows: None)
            backward(self.weights.scale_loss(value), self._splits[local_shard])
            return outcome

        with self._computing():
            outcomes = self._executor.run(forward_backward)
        self._reducer.finish_micro_step(last=last)
        return Outcome(*[torch.cat(tensors) for tensors in zip(*outcomes, strict=True)])

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Make the weights available to the replicas. Context manager."""
        self._replicas.refresh()
        if self._sharded:
            self._sharded.gather_other_parameters()
        yield
        if self._sharded:
            self._sharded.free()

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        self._replicas.mark_stale()
        return self.weights.step(lr, step=step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._replicas.models.eval()
        try:
            with self.weights.evaluating():
                self._replicas.mark_stale()
                yield
        finally:
            self._replicas.models.train()
            self._replicas.mark_stale()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._replicas.mark_stale()
        self.weights.load(tensors)


def _synchronize(reducer: GradientReducer, gather_rows: StatisticsGather, own_rows: list[Tensor]) -> Tensor:
    """Run at a barrier of all shards: start the reduction of full gradient buckets, then gather the rows."""
    reducer.start_full_buckets()
    return gather_rows(own_rows)


def _hand_over_gradient(reducer: GradientReducer, shard: int, index: int, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    reducer.add_gradient(shard, index, gradient)
