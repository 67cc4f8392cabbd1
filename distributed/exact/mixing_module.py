"""Finds the innermost module that mixes samples, once it is known that the network does."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed.exact.saved_model import same_bits


class _Call(NamedTuple):
    path: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ModuleCalls:
    """The inputs and outputs of all modules' forward calls, those that end first first: inner before outer modules.

    Args:
        samples: the size of the batch.
        kept: position of a sample; if given, the values that belong to it are recorded, otherwise the tensors themselves.
    """

    def __init__(self, samples: int, kept: int | None = None) -> None:
        self.ended: list[_Call] = []
        self._samples, self._kept = samples, kept
        self._begun: list[list[Tensor]] = []

    def before(self, inside: str, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        self._begun.append(self._recorded(inputs))

    def after(self, module: nn.Module, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.ended.append(_Call(path, self._begun.pop(), self._recorded(outputs)))

    def _recorded(self, values: list[Tensor]) -> list[Tensor]:
        if self._kept is None:
            return [value for value in values if rows(value, self._samples) is not None]
        kept_rows = (rows(value, self._samples) for value in values)
        return [value[self._kept].detach().clone() for value in kept_rows if value is not None]


def rows(tensor: Tensor, samples: int) -> Tensor | None:
    """Return a view or copy [samples, ...] of a tensor whose first dimension has one or several entries for each sample."""
    return tensor.reshape(samples, -1) if tensor.dim() and tensor.numel() and len(tensor) % samples == 0 else None


def first_difference(first: ModuleCalls, second: ModuleCalls) -> str:
    """Return the path of the first module that got the same values in two passes and returned others; "" if none did."""
    for a, b in zip(first.ended, second.ended, strict=False):
        if a.path == b.path and _equal(a.inputs, b.inputs) and not _equal(a.outputs, b.outputs):
            return a.path
    return ""


def first_crossing(calls: ModuleCalls, logits: Tensor, kept: int) -> str:
    """Return the path of the first module from whose inputs on `logits[kept]` depends on others; "" if none is found.

    A module counts if the logits depend on other rows of its inputs and not on other rows of its outputs, and its outputs
    depend on other rows of its inputs.
    """
    samples = len(logits)
    for call in calls.ended:
        pairs = [(output, value) for output in call.outputs for value in call.inputs if value.requires_grad]
        if (
            any(crosses(logits, value, kept, samples) for value in call.inputs)
            and not any(crosses(logits, output, kept, samples) for output in call.outputs)
            and any(crosses(output, value, kept, samples) for output, value in pairs)
        ):
            return call.path
    return ""


def crosses(output: Tensor, source: Tensor, kept: int, samples: int) -> bool:
    """Whether the gradient of sample `kept`'s rows of an output by other samples' rows of its source is not zero.

    A NaN says nothing: it is zero times infinity, e.g. behind the square root of zero.
    """
    if not (output.requires_grad and source.requires_grad):
        return False
    all_rows = rows(output, samples)
    assert all_rows is not None
    row = all_rows[kept]
    # Weights in general position: gradients of different elements do not cancel.
    weights = 0.5 + torch.rand(row.shape, generator=torch.Generator().manual_seed(0))
    scalar = (torch.where(row.isfinite(), row, 0) * weights).sum()
    gradient = torch.autograd.grad(scalar, source, retain_graph=True, allow_unused=True)[0]
    if gradient is None or (by_sample := rows(gradient, samples)) is None:
        return False
    others = torch.cat([by_sample[:kept], by_sample[kept + 1 :]])
    return bool(((others != 0) & ~others.isnan()).any())


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(same_bits(a, b) for a, b in zip(first, second, strict=True))
