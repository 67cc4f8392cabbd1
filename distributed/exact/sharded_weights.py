"""Weights sharded over the ranks; a layer's are gathered from all of them while its shards compute.

All shards pass through the layers in the same order, so a layer is gathered by whichever of the rank's shards reaches it first,
and the order of gathers is the same on all ranks. This requires that no shard starts its backward pass before all have finished
the forward pass.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distributed.comm.collectives import all_gather, world_size
from distributed.exact.partition import BlockPartition
from distributed.exact.torch_compat import Node


class ShardedWeights:
    """Keeps this rank's part of every parameter in `local` and frees the model's own memory; the model keeps only shapes.

    Args:
        layers: names of the layers that are gathered one by one, each with the number of times a forward pass calls it. No
            other code uses their parameters. All other parameters are gathered for the entire pass.
        low: the dtype in which these layers compute, if it is not that of their weights; cast before sending.
        reshard_after_forward: free a layer after the last shard's forward pass and gather it again for the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Mapping[str, int],
        shards: int,
        low: torch.dtype | None,
        reshard_after_forward: bool,
    ) -> None:
        self._reshard, self._calls = reshard_after_forward, layers
        self._lock = threading.Lock()
        self.partitions = {name: BlockPartition(p, shards=shards) for name, p in model.named_parameters()}
        self.local = {
            name: self.partitions[name].local_part(p.detach()).clone() for name, p in model.named_parameters()
        }
        self.gathered: dict[int, Tensor] = {}
        """The tensor to compute with, by the parameter's id; it has memory only while its layer is gathered."""
        self.before: dict[Node, Callable[[], None]] = {}
        """Gathers the layer of an autograd node; to be called before the node runs."""
        self._layers: dict[str, _Layer] = {}
        self._layer_of: dict[Tensor, _Layer] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        for prefix in [*layers, ""]:
            module = model.get_submodule(prefix)
            own = {names.pop(id(p)): p for p in module.parameters(recurse=not prefix) if id(p) in names}
            dtype = low if prefix else None
            targets = {
                name: p.detach() if dtype is None else torch.empty_like(p, dtype=dtype) for name, p in own.items()
            }
            self.gathered |= {id(p): targets[name] for name, p in own.items()}
            self._layers[prefix] = _Layer(self, targets)
        for parameter in model.parameters():
            parameter.untyped_storage().resize_(0)

    def attach(self, model: nn.Module, shards: int) -> None:
        """Make a copy of the model, with which `shards` shards compute on this rank, gather and free layers as it computes."""
        for prefix, calls in self._calls.items():
            module, layer = model.get_submodule(prefix), self._layers[prefix]
            trainable = [p for p in module.parameters(recurse=False) if p.requires_grad]
            self._layer_of |= dict.fromkeys(trainable, layer)
            layer.expected_forwards = calls * shards
            # The gradient of a weight comes after its last use, but that of a bias may come before. 0: freed after the pass.
            frozen = [name for name, p in module.named_parameters(recurse=False) if not p.requires_grad]
            layer.expected_gradients = 0 if "weight" in frozen else len(trainable) * shards
            module.register_forward_pre_hook(partial(self._before_forward, layer))
            module.register_forward_hook(partial(self._after_forward, layer))

    def gather_other_parameters(self) -> None:
        """Gather the parameters outside `layers`. Call before a pass over the model."""
        self._gather(self._layers[""])

    def free(self) -> None:
        """Free all layers. Call after a pass over the model, before the weights change."""
        self.before.clear()
        for layer in self._layers.values():
            layer.free()
            layer.forwards = layer.gradients = 0

    def after_gradient(self, parameter: Tensor) -> None:
        """Count a shard's gradient of a parameter of the attached model; free the layer after the last one."""
        if layer := self._layer_of.get(parameter):
            with self._lock:
                layer.gradients += 1
                if layer.gradients == layer.expected_gradients:
                    layer.free()

    def _gather(self, layer: "_Layer") -> None:
        with self._lock:  # the first shard gathers, the others wait for it
            layer.gather()

    def _before_forward(self, layer: "_Layer", _module: nn.Module, _inputs: Any) -> None:
        self._gather(layer)

    def _after_forward(self, layer: "_Layer", _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.grad_fn is not None:
            self.before[output.grad_fn] = partial(self._gather, layer)
        with self._lock:
            layer.forwards += 1
            if layer.forwards == layer.expected_forwards and (self._reshard or output.grad_fn is None):
                layer.free()


class _Layer:
    """The parameters of one layer, gathered together."""

    def __init__(self, weights: ShardedWeights, targets: Mapping[str, Tensor]) -> None:
        self.targets, self._weights = targets, weights
        self._bytes = {name: target.untyped_storage().nbytes() for name, target in targets.items()}
        self._is_gathered = True
        self.forwards = self.expected_forwards = self.gradients = self.expected_gradients = 0
        self.free()

    def free(self) -> None:
        for target in self.targets.values():
            target.untyped_storage().resize_(0)
        self._is_gathered = False

    @torch.no_grad()
    def gather(self) -> None:
        if self._is_gathered:
            return
        for dtype in {target.dtype for target in self.targets.values()}:
            self._gather_dtype({name: target for name, target in self.targets.items() if target.dtype == dtype})
        self._is_gathered = True

    def _gather_dtype(self, targets: Mapping[str, Tensor]) -> None:
        partitions, local = self._weights.partitions, self._weights.local
        like = next(iter(targets.values()))
        sent = like.new_zeros(sum(partitions[name].max_length for name in targets))
        offset = 0
        for name in targets:
            sent[offset : offset + len(local[name])] = local[name]
            offset += partitions[name].max_length
        received = like.new_empty(world_size(), len(sent))
        all_gather(received.view(-1), sent)
        offset = 0
        for name, target in targets.items():
            storage = target.untyped_storage()
            storage.resize_(self._bytes[name])
            # A new tensor has a version counter of its own; otherwise autograd would consider its saved tensors overwritten.
            flat = target.new_empty(0).set_(storage, target.storage_offset(), (target.numel(),), (1,))
            for row, elements in zip(received, partitions[name].ranges, strict=True):
                flat[elements] = row[offset : offset + elements.stop - elements.start]
            offset += partitions[name].max_length
