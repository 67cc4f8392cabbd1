"""Every sum is taken in one fixed tree: the same bits on any number of ranks, with weights replicated or shared out.

The batch is cut into a fixed number of shards, each of which goes through a replica of the model by itself, on one
thread. What is summed over the batch, gradients and batch norm's statistics, is summed over shards in a tree.
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
from distributed.engine.model_state import Layout, ModelState, autocast, cast, low_type
from distributed.engine.protocol import Loss, Outcome
from distributed.exact.batch_norm import Cut, CuttingBatchNorm, backward
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
        model: float32 on the CPU, with its initial weights; taken over.
        shards: of the whole batch, a power of two, at least world_size.
        lanes: shards of this rank that compute at the same time.

    Raises:
        ValueError: a layer of the model cannot be computed shard by shard.
    """

    def __init__(
        self,
        config: Ddp | Fsdp,
        model: nn.Module,
        *,
        optim: Sgd | AdamW,
        precision: str,
        channels_last: bool,
        device: torch.device,
        shards: int,
        lanes: int,
        timeout_seconds: float,
    ) -> None:
        self.device, self.precision = device, precision
        check_exact(model)
        self._plain = cast(model, precision=precision, channels_last=channels_last, device=device)
        gather = open_all_gather(device, timeout_seconds=timeout_seconds) if world_size() > 1 else None
        parameters = [p for p in self._plain.parameters() if p.requires_grad]
        low = low_type(precision)
        self._sharded: ShardedWeights | None = None
        if isinstance(config, Fsdp) and world_size() > 1:
            reshard = config.reshard_after_forward
            self._sharded = ShardedWeights(self._plain, shards=shards, low=low, reshard_after_forward=reshard)
        self._reduction = GradientReducer(
            parameters,
            shards=shards,
            bucket_bytes=config.bucket_mib * 2**20 if isinstance(config, Ddp) else 2**20,
            open_exchange=BucketReduceOpener(timeout_seconds=timeout_seconds),
            parts=list(self._sharded.parts.values()) if self._sharded else None,
        )
        own = self._reduction.own
        rows = StatisticsGather(gather, shards=shards)
        # Weights are gathered on the first shard's stream; the other streams would not wait for it.
        self._lanes = ShardExecutor(
            len(own), lanes=lanes, gather=partial(_meet, self._reduction, rows), device=device,
            side_by_side=self._sharded is None,
        )  # fmt: skip
        self._replicas = Replicas(
            self._plain, len(own), low=low, computed=self._sharded.computed if self._sharded else None
        )
        self._cuts: list[list[Cut]] = [[] for _ in own]
        for place, replica in enumerate(self._replicas.models):
            meet = partial(self._lanes.meet, place)
            convert_batch_norm(replica, partial(CuttingBatchNorm.cutting, exchange=meet, cuts=self._cuts[place]))
            for index, parameter in enumerate(p for p in replica.parameters() if p.requires_grad):
                hand_over = partial(_hand_over, self._reduction, own[place], index)
                parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
            if self._sharded:
                self._sharded.attach(replica, len(own))
        self.model: nn.Module = self._replicas.models
        layout: Layout = BlockReplicatedLayout(self._plain, shards=shards)
        if self._sharded:
            layout = BlockShardedLayout(self._sharded, self._plain, shards=shards)
        self.weights = ModelState(optim, self._plain, precision=precision, layout=layout)
        # What runs on the whole part of a rank must not depend on its threads either.
        torch.set_num_threads(1)

    def predict(self, batch: Batch) -> Tensor:
        parts = batch.shards()

        def forward(place: int) -> Tensor:
            with torch.no_grad(), autocast(self.device, self.precision):  # these are set by thread
                logits: Tensor = self._replicas.models[place](parts[place].images, parts[place].sample_keys)
                return logits

        with self._computing():
            return torch.cat(self._lanes.run(forward))

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        parts = batch.shards()

        def forward_backward(place: int) -> Outcome:
            with autocast(self.device, self.precision):
                value, outcome = loss(self._replicas.models[place], parts[place])
            if self._sharded:  # nobody goes back through a layer before all are through it
                self._lanes.meet(place, value.detach().view(1), lambda rows: None)
            backward(self.weights.scaled(value), self._cuts[place])
            return outcome

        with self._computing():
            outcomes = self._lanes.run(forward_backward)
        self._reduction.finish(last=last)
        return Outcome(*[torch.cat(tensors) for tensors in zip(*outcomes, strict=True)])

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Weights are there to compute with."""
        self._replicas.refresh()
        if self._sharded:
            self._sharded.open()
        yield
        if self._sharded:
            self._sharded.close()

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        self._replicas.weights_changed()
        return self.weights.update(lr, step=step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._replicas.models.eval()
        with self.weights.evaluated():
            self._replicas.weights_changed()
            yield
        self._replicas.models.train()
        self._replicas.weights_changed()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._replicas.weights_changed()
        self.weights.load(tensors)


def _meet(reduction: GradientReducer, rows: StatisticsGather, own: list[Tensor]) -> Tensor:
    """Barrier of all shards: starts the exchange of full gradient buckets, then gathers the rows."""
    reduction.send_full()
    return rows(own)


def _hand_over(reduction: GradientReducer, shard: int, index: int, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    reduction.take(shard, index, gradient)
