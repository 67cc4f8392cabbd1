"""Sums gradients over the ranks of a host: fast mode's exchange on CPUs.

There is nothing to overlap with on a CPU, where the threads of an exchange would only interrupt the backward pass. So autograd
runs without hooks, gradients add up in `.grad` over micro-steps, and after the last one they are exchanged all at once.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from distributed.comm.shared_sum import SharedSum


class SharedGradients:
    """Sums the gradients of `parameters` over all ranks, in their own dtype or rounded to `low`.

    `reduced_bytes` counts the bytes summed so far.
    """

    def __init__(self, parameters: Sequence[Tensor], low: torch.dtype | None, shared: SharedSum) -> None:
        self.reduced_bytes = 0
        self._parameters, self._shared, self._sent_bytes = parameters, shared, shared.own.nbytes
        # Gradients are views of the shared total, unless that is in a lower dtype.
        dtype = parameters[0].dtype
        self._widened = None if low is None else torch.zeros_like(shared.total, dtype=dtype)
        self._sent = self._views(shared.own)
        self._sums = self._views(shared.total if self._widened is None else self._widened)

    @classmethod
    def open(
        cls, parameters: Sequence[Tensor], low: torch.dtype | None, device: torch.device, *, timeout_seconds: float
    ) -> Self | None:
        """Return an exchange of these gradients, or None if the ranks cannot share memory. A collective."""
        length = sum(map(torch.numel, parameters))
        dtype = low or parameters[0].dtype
        shared = SharedSum.open(length, dtype, device, timeout_seconds=timeout_seconds)
        return cls(parameters, low, shared) if shared else None

    def sum(self) -> None:
        """Replace every `.grad` by its sum over all ranks, valid until the next call. A collective.

        Raises:
            RuntimeError: a rank has died or timed out.
        """
        # The loss does not depend on a parameter without a gradient.
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        torch._foreach_copy_(self._sent, own)
        self._shared.sum()
        self.reduced_bytes += self._sent_bytes
        if self._widened is not None:
            self._widened.copy_(self._shared.total)
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Return one view of the flat buffer per parameter, in its memory layout."""
        views, offset = list[Tensor](), flat.storage_offset()
        for parameter in self._parameters:
            dense = torch.empty_like(parameter, device="meta")  # even if the parameter is not
            views.append(flat.as_strided(parameter.shape, dense.stride(), offset))
            offset += parameter.numel()
        return views
