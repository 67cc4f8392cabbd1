"""A model's weights shared out over the ranks, a layer's gathered from all of them for as long as its shards compute.

Every shard goes through the layers in one order, so whichever of a rank's shards comes to a layer first gathers it, and
the order of gathers is the same on all ranks. It needs that no shard begins its backward pass before all are through the
forward one.
"""

import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distributed.comm.collectives import all_gather, world_size
from distributed.exact.partition import BlockPartition
from distributed.exact.replicas import LAYERS


class ShardedWeights:
    """Keeps `parts` of all parameters, which are taken away from the model but for their shapes.

    Args:
        low: what convolutions and linear layers compute in, if not in the type of their weights; cast before it is sent.
        reshard_after_forward: free a layer after the last shard's forward pass and gather it anew for the backward one.
    """

    def __init__(self, model: nn.Module, *, shards: int, low: torch.dtype | None, reshard_after_forward: bool) -> None:
        self._reshard = reshard_after_forward
        self._lock = threading.Lock()
        self.blocks = {name: BlockPartition(p, shards=shards) for name, p in model.named_parameters()}
        self.parts = {name: self.blocks[name].cut(p.detach()).clone() for name, p in model.named_parameters()}
        self.computed: dict[int, Tensor] = {}
        """What a parameter, by its id, is computed with: memory that is there while its layer is gathered."""
        self._layers: dict[str, _Layer] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        for prefix, layer in [*_layers(model), ("", model)]:
            own = {names.pop(id(p)): p for p in layer.parameters(recurse=not prefix) if id(p) in names}
            dtype = low if prefix else None
            targets = {
                name: p.detach() if dtype is None else torch.empty_like(p, dtype=dtype) for name, p in own.items()
            }
            self.computed |= {id(p): targets[name] for name, p in own.items()}
            self._layers[prefix] = _Layer(self, targets)
        for parameter in model.parameters():
            parameter.untyped_storage().resize_(0)

    def attach(self, replica: nn.Module, copies: int) -> None:
        """Let a copy of the model, one of so many of this rank, gather and free as it computes."""
        for prefix, layer in _layers(replica):
            own = self._layers[prefix]
            layer.register_forward_pre_hook(partial(self._before, own))
            layer.register_forward_hook(partial(self._after, own, copies))
            for parameter in layer.parameters(recurse=False):
                expected = copies * len(own.targets)
                hook: Any = partial(self._taken, own, expected)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def open(self) -> None:
        """Before a pass over the model: gather what belongs to no convolution or linear layer."""
        self._need(self._layers[""])

    def close(self) -> None:
        """After a pass over the model, and before the weights change."""
        for layer in self._layers.values():
            layer.free()

    def _need(self, layer: "_Layer", _: Any = None) -> None:
        with self._lock:  # the shard that comes first gathers, the others wait for it
            layer.gather()

    def _before(self, layer: "_Layer", _module: nn.Module, _inputs: Any) -> None:
        self._need(layer)

    def _after(self, layer: "_Layer", copies: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            gather: Any = partial(self._need, layer)
            output.register_hook(gather)  # type: ignore[no-untyped-call]  # just before the layer's own backward pass
        with self._lock:
            layer.passed += 1
            if layer.passed % copies == 0 and (self._reshard or not output.requires_grad):
                layer.free()

    def _taken(self, layer: "_Layer", expected: int, _: Tensor) -> None:
        with self._lock:
            layer.taken += 1
            if layer.taken % expected == 0:
                layer.free()


class _Layer:
    """The parameters of one layer, gathered in one exchange."""

    def __init__(self, weights: ShardedWeights, targets: Mapping[str, Tensor]) -> None:
        self.targets, self._weights = targets, weights
        self._bytes = {name: target.untyped_storage().nbytes() for name, target in targets.items()}
        self._there, self.passed, self.taken = True, 0, 0
        self.free()

    def free(self) -> None:
        for target in self.targets.values():
            target.untyped_storage().resize_(0)
        self._there = False

    @torch.no_grad()
    def gather(self) -> None:
        if self._there:
            return
        for dtype in {target.dtype for target in self.targets.values()}:
            self._gather({name: target for name, target in self.targets.items() if target.dtype == dtype})
        self._there = True

    def _gather(self, targets: Mapping[str, Tensor]) -> None:
        blocks, parts = self._weights.blocks, self._weights.parts
        like = next(iter(targets.values()))
        sent = like.new_zeros(sum(blocks[name].most for name in targets))
        offset = 0
        for name in targets:
            sent[offset : offset + len(parts[name])] = parts[name]
            offset += blocks[name].most
        received = like.new_empty(world_size(), len(sent))
        all_gather(received.view(-1), sent)
        offset = 0
        for name, target in targets.items():
            storage = target.untyped_storage()
            storage.resize_(self._bytes[name])
            # A tensor of its own, with a version of its own: autograd would take what it saved for overwritten.
            flat = target.new_empty(0).set_(storage, 0, (target.numel(),), (1,))
            for row, run in zip(received, blocks[name].runs, strict=True):
                flat[run] = row[offset : offset + run.stop - run.start]
            offset += blocks[name].most


def _layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
