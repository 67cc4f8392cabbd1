"""Exact mode: bit-identical results on any number of ranks, with replicated or sharded weights.

The batch is split into a fixed number of shards. Each passes through the model alone, on one thread. Everything that is summed
over the batch, i.e. gradients and batch-norm statistics, is summed over shards in a fixed tree.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from distributed.comm.all_gather import open_all_gather
from distributed.comm.collectives import world_size
from distributed.config.engines import Ddp, Fsdp
from distributed.config.optim import AnyOptim
from distributed.data.batch import Batch
from distributed.engine.exact_layout import BlockReplicatedLayout, BlockShardedLayout
from distributed.engine.model_state import Layout, ModelState, evaluation_mode
from distributed.engine.prepare import Compute, cast
from distributed.engine.protocol import Loss, Outcome
from distributed.engine.sharding import LocalTensor
from distributed.exact.autograd_pass import GradientSink, backward
from distributed.exact.bucket_reduce import BucketReduceOpener
from distributed.exact.compute_copy import ComputeCopy
from distributed.exact.gather_statistics import StatisticsGather
from distributed.exact.gradient_reducer import GradientReducer
from distributed.exact.group_trials import GroupTrials
from distributed.exact.shard_executor import ShardExecutor
from distributed.exact.shard_gradients import GradientSums, GroupedShards, SingleShard
from distributed.exact.shard_group import ShardGroup, use_group
from distributed.exact.sharded_weights import ShardedWeights
from distributed.exact.torch_compat import Node
from distributed.models.sync_batch_norm import SyncBatchNorm, convert_batch_norm


class ExactEngine:
    """An `Engine` in exact mode.

    Args:
        model: float32 on the CPU, with its initial weights; the engine takes ownership.
        shards: number of shards of the global batch, a power of two, at least world_size.
        workers: number of this rank's shards that compute at the same time.
        layers: by name, the convolutions and linear layers whose parameters nothing else uses, each with its calls in one pass.
    """

    def __init__(
        self,
        config: Ddp | Fsdp,
        model: nn.Module,
        *,
        optim: AnyOptim,
        compute: Compute,
        shards: int,
        workers: int,
        layers: Mapping[str, int],
    ) -> None:
        self.compute, timeout = compute, compute.timeout_seconds
        self._plain = cast(model, compute)
        low = compute.low_dtype
        self._sharded: ShardedWeights | None = None
        if isinstance(config, Fsdp) and world_size() > 1:
            reshard = config.reshard_after_forward
            self._sharded = ShardedWeights(
                self._plain, layers=layers, shards=shards, low=low, reshard_after_forward=reshard
            )
        gather = open_all_gather(compute.device, timeout_seconds=timeout) if world_size() > 1 else None
        trained = {name: p for name, p in self._plain.named_parameters() if p.requires_grad}
        self._reducer = GradientReducer(
            list(trained.values()),
            shards=shards,
            bucket_bytes=config.bucket_mib * 2**20 if isinstance(config, Ddp) else 2**20,
            open_bucket_reduce=BucketReduceOpener(timeout_seconds=timeout),
            local=[self._sharded.local[name] for name in trained] if self._sharded else None,
        )
        # Sharded weights are gathered on the first shard's stream, and other streams would not wait for it.
        self._executor = ShardExecutor(
            len(self._reducer.own_shards), workers=workers, device=compute.device, own_streams=self._sharded is None,
            gather=partial(_synchronize, self._reducer, StatisticsGather(gather, shards=shards)),
        )  # fmt: skip
        gathered = self._sharded.gathered if self._sharded else None
        self._copy = ComputeCopy(self._plain, low=low, cast_layers=layers, gathered=gathered)
        self.model = self._copy.model
        convert_batch_norm(self.model, partial(SyncBatchNorm.of, all_gather_rows=self._executor.all_gather_rows))
        self._index: dict[Tensor, int] = {
            p: i for i, p in enumerate(p for p in self.model.parameters() if p.requires_grad)
        }
        self._groups = GroupTrials(
            self.model, self._executor, possible=compute.device.type == "cpu" and self._sharded is None
        )
        layout: Layout = BlockReplicatedLayout(self._plain, shards=shards)
        self._before: dict[Node, Callable[[], None]] = {}
        if self._sharded:
            self._sharded.attach(self.model, len(self._reducer.own_shards))
            self._before = self._sharded.before
            layout = BlockShardedLayout(self._sharded, self._plain, shards=shards)
        self.weights = ModelState(optim, self._plain, precision=compute.precision, layout=layout)
        if compute.device.type == "cpu":
            # Operations on all of a rank's weights, e.g. norms, must not depend on its number of threads either.
            torch.set_num_threads(1)

    def predict(self, batch: Batch) -> Tensor:
        shards = batch.shards()

        def forward(local_shard: int) -> Tensor:
            with torch.no_grad(), self._autocast():  # both are set per thread
                logits: Tensor = self.model(shards[local_shard].images)
                return logits

        with self._computing():
            return torch.cat(self._executor.run(forward))

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        with self._computing():
            passes = partial(self._pass, loss, batch)
            outcome = passes(
                self._reducer, grouped=self._groups.allowed((batch.shard_sizes, batch.images.shape[1:]), passes)
            )
        self._reducer.finish_micro_step(last=last)
        return outcome

    def _pass(self, loss: Loss, batch: Batch, sums: GradientSums, *, grouped: bool) -> Outcome:
        """Run forward and backward; hand over each shard's gradient of every parameter.

        The gradient of a parameter which the loss does not depend on is zero.

        Args:
            grouped: run all shards of a worker as one batch.
        """

        def forward_backward(local: range) -> Outcome:
            part, shards = batch.group(local), self._reducer.own_shards[local.start : local.stop]
            gradients: SingleShard | GroupedShards
            if grouped:
                gradients = GroupedShards(shards, self._index, sums)
                group = ShardGroup(part.shard_sizes, gradients.add_of_shards, gradients.flush)
            else:
                gradients, group = SingleShard(shards.start, self._index, sums), None
            with use_group(group), self._autocast():
                value, outcome = loss(self.model, part)
            if self._sharded:  # a barrier: no backward pass starts before all forward passes have finished
                self._executor.all_gather_rows([value.detach().view(1)], lambda rows: None)
            value = self.weights.scale_loss(value)  # not kept: its graph is freed node by node
            backward(value, self._and_free(gradients.add), self._before)
            gradients.finish()
            return outcome

        if grouped:
            outcomes = self._executor.run_groups(forward_backward)
        else:
            outcomes = self._executor.run(lambda shard: forward_backward(range(shard, shard + 1)))
        return Outcome(*[torch.cat(tensors) for tensors in zip(*outcomes, strict=True)])

    def _and_free(self, sink: GradientSink) -> GradientSink:
        """Return a sink that also frees a layer of sharded weights after its last gradient."""
        if self._sharded is None:
            return sink
        after_gradient = self._sharded.after_gradient

        def sink_and_free(parameter: Tensor, gradient: Tensor) -> None:
            sink(parameter, gradient)
            after_gradient(parameter)

        return sink_and_free

    def _autocast(self) -> AbstractContextManager[None]:
        # Without a cache: a cast weight in it would be part of the graphs of several shards.
        return self.compute.autocast(cache=False)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Make the weights available to the shards. Context manager."""
        self._copy.refresh()
        if self._sharded:
            self._sharded.gather_other_parameters()
        yield
        if self._sharded:
            self._sharded.free()

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        self._copy.mark_stale()
        return self.weights.step(lr, step=step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        try:
            with self.weights.averaged(), evaluation_mode(self.model):
                self._copy.mark_stale()
                yield
        finally:
            self._copy.mark_stale()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.state()

    def local_tensors(self) -> dict[str, LocalTensor]:
        return self.weights.local_tensors()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._copy.mark_stale()
        self.weights.load(tensors)


def _synchronize(reducer: GradientReducer, gather_rows: StatisticsGather, own_rows: list[Tensor]) -> Tensor:
    """Run at a barrier of all shards: start the reduction of full gradient buckets, then gather the rows."""
    reducer.start_full_buckets()
    return gather_rows(own_rows)
