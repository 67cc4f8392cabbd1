"""Finds out whether shards may pass through the model as one batch: whether that gives the bits of each shard alone.

Kernels choose their code by the shapes of their inputs, not by the numbers in them, so a trial with one batch decides for all
batches of its shapes. That would be no proof for functions such as exp, which a vectorized loop and its scalar remainder may
round differently: an element can be in the remainder of a shard, but not in that of a group. So a trial fails if a network uses
an operation outside the list below. Those on it move numbers, round correctly, or treat each sample alone.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from distributed.exact.bits import digest
from distributed.exact.check.sample_mixing import fill_constant_weights
from distributed.exact.grouped_layers import make_groupable
from distributed.exact.shard_executor import ShardExecutor
from distributed.exact.shard_gradients import GradientSums, NotGroupableError
from distributed.models.torch_compat import TorchDispatchMode

_LAYERS = """
    convolution convolution_backward addmm mm native_batch_norm native_batch_norm_backward batch_norm_update_stats
    max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward mean sum _adaptive_avg_pool2d
    _adaptive_avg_pool2d_backward _upsample_bilinear2d_aa
"""
_PER_SAMPLE = "_log_softmax _log_softmax_backward_data nll_loss_forward nll_loss_backward"
_CORRECTLY_ROUNDED = """
    add sub mul div neg addcmul lerp sqrt rsqrt reciprocal clamp clamp_min hardtanh hardtanh_backward relu threshold_backward
    leaky_relu leaky_relu_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward eq ne lt le gt ge where
    masked_fill bitwise_and bitwise_or bitwise_xor bitwise_not __rshift__ __lshift__
"""
_MOVING = """
    _to_copy _unsafe_view alias arange as_strided cat clone constant_pad_nd copy detach empty empty_like empty_strided expand
    fill full full_like lift_fresh new_empty new_full new_zeros ones_like permute promote_types select slice slice_backward
    split split_with_sizes squeeze stack t transpose unbind unsqueeze view zero zeros zeros_like
"""
_ALLOWED = frozenset(" ".join((_LAYERS, _PER_SAMPLE, _CORRECTLY_ROUNDED, _MOVING)).split())


class Passes(Protocol):
    """Runs forward and backward over this rank's shards of a batch, alone or in groups; returns tensors to compare."""

    def __call__(self, sums: GradientSums, *, grouped: bool) -> tuple[Tensor, ...]: ...


class GroupTrials:
    """The results of trials, by the shapes of the inputs.

    Args:
        model: with synchronized batch norm.
        possible: whether groups are of use at all.
    """

    def __init__(self, model: nn.Module, executor: ShardExecutor, *, possible: bool) -> None:
        self._model, self._executor = model, executor
        self._possible = possible and executor.largest_group > 1 and make_groupable(model)
        self._seen = set[Hashable]()
        self._allowed: dict[Hashable, bool] = {}

    def allowed(self, shapes: Hashable, passes: Passes) -> bool:
        """Return whether shards of these shapes may be grouped. Tries it, without other ranks, when they occur a second time.

        Args:
            shapes: the number of images in each shard, and their size.
        """
        if not self._possible:
            return False
        if shapes in self._seen and shapes not in self._allowed:
            self._allowed[shapes] = self._try(passes)
        self._seen.add(shapes)
        return self._allowed.get(shapes, False)

    def _try(self, passes: Passes) -> bool:
        with self._executor.alone(), _varied_weights(self._model):
            try:
                with _unchanged_buffers(self._model), _Operations() as operations:
                    grouped = _digests(passes, grouped=True)
            except (NotGroupableError, RuntimeError):  # e.g. of a split, if dimension 0 is not that of the samples
                return False
            if not operations.names <= _ALLOWED:
                return False
            with _unchanged_buffers(self._model):
                return grouped == _digests(passes, grouped=False)


def _digests(passes: Passes, *, grouped: bool) -> dict[Any, Hashable]:
    """Return the digests of all gradients and results."""
    found = _Found({})
    for number, result in enumerate(passes(found, grouped=grouped)):
        found.digests["result", number] = digest(result)
    return found.digests


@dataclass
class _Found:
    """Keeps the gradients' digests instead of adding the gradients up: `GradientSums`.

    The gradients themselves would take the memory of the weights once per shard.
    """

    digests: dict[Any, Hashable]

    def add_gradient(self, shard: int, index: int, gradient: Tensor) -> None:
        self.digests[shard, index] = digest(gradient)

    def add_gradients(self, shards: range, gradients: Mapping[int, Sequence[Tensor]]) -> None:
        for index, of_shards in gradients.items():
            for shard, gradient in zip(shards, of_shards, strict=True):
                self.add_gradient(shard, index, gradient)


@contextmanager
def _varied_weights(model: nn.Module) -> Iterator[None]:
    """Change constant weights: behind zeros, e.g. of a new head, all gradients are zero, so their bits are equal.

    Context manager; restores the weights on exit.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        fill_constant_weights(model)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restore all buffers on exit. Context manager."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of the operations that this thread runs, without the underscore of in-place variants."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler: a second, and 200 MiB

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.add(name.removesuffix("_") if not name.endswith("__") else name)
        return func(*args, **(kwargs or {}))
