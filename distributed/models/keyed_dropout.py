"""Dropout with masks computed from (seed, epoch, sample id, layer): the same on any rank, device and attempt.

The keys of the samples come by context, so a network calls these layers like torch's own.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distributed import rng
from distributed.errors import InputError


@dataclass
class _Samples:
    """Keys of the samples of a forward pass, int64 [n, 2], and how often each layer has drawn for them."""

    keys: Tensor
    uses: dict[str, int] = field(default_factory=dict)


_samples: ContextVar[_Samples | None] = ContextVar("_samples", default=None)
# The latest one for compiled code, which runs on one thread: torch 2.11's compiler cannot trace ContextVar.get.
_for_compiled: list[_Samples | None] = [None]


@contextmanager
def use_sample_keys(keys: Tensor) -> Iterator[None]:
    """Draw the dropout masks of one forward pass from these keys. Context manager, of this thread or greenlet only.

    Args:
        keys: int64 [n, 2] from `rng.sample_keys`, on the model's device.
    """
    samples = _for_compiled[0] = _Samples(keys)
    token = _samples.set(samples)
    try:
        yield
    finally:
        _samples.reset(token)
        _for_compiled[0] = _samples.get()


def repeated_draws() -> AbstractContextManager[None]:
    """Return a context, for any thread, in which dropout repeats the masks that it draws after this call."""
    now = _samples.get()
    uses = {} if now is None else dict(now.uses)

    @contextmanager
    def again() -> Iterator[None]:
        token = _samples.set(None if now is None else _Samples(now.keys, dict(uses)))
        try:
            yield
        finally:
            _samples.reset(token)

    return again()


class KeyedDropout(nn.Module):
    """In training, zeroes each unit with probability `p` and scales the others by 1 / (1 - p).

    Called again in the same forward pass, it draws another mask.

    Args:
        p: dropout probability in [0, 1]. Below 1 it is rounded to a multiple of 1/65536, at most 65535/65536.
        name: distinguishes the masks of several layers, e.g. the module's path.
        per: a unit is an element, a channel (dimension 1), or the entire sample.
        scaled: False keeps the other units as they are.
        inplace: change the input itself.
        dims: the number of dimensions that a batched input has; None: any.
        replaces: name of the layer that this one stands for, in error messages.
    """

    def __init__(
        self,
        p: float,
        *,
        name: str,
        per: Literal["element", "channel", "sample"] = "element",
        scaled: bool = True,
        inplace: bool = False,
        dims: int | None = None,
        replaces: str = "Dropout",
    ) -> None:
        super().__init__()
        self.p, self.name, self.per, self.inplace = p, name, per, inplace
        self.dims, self.replaces = dims, replaces
        self.threshold = min(65535, round(p * 65536))
        self.scale = 65536 / (65536 - self.threshold) if scaled else 1.0
        self._units = _UnitKeys(name)

    def kept(self, keys: Tensor, count: int, *, use: int = 0) -> Tensor:
        """Return the mask of kept units, bool [n, count], for sample keys int64 [n, 2], at the layer's use number `use`."""
        return rng.at_least16(keys, self._units.get(keys, count, use), self.threshold)[:, :count]

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout to input [n, ...].

        Raises:
            ValueError: training outside `use_sample_keys`.
            InputError: dimension 0 of input is not that of the samples.
        """
        if not self.training or not self.threshold:
            return input
        if self.p == 1:
            return _times(input, 0.0, inplace=self.inplace)
        return self._apply_mask(input, self._draw(input))

    def _apply_mask(self, x: Tensor, kept: Tensor) -> Tensor:
        if self.per == "element":
            return _times(_times(x, self.scale, inplace=self.inplace), kept, inplace=self.inplace)
        return _times(x, kept.to(x.dtype) * self.scale, inplace=self.inplace)  # one pass over x

    def _draw(self, x: Tensor) -> Tensor:
        """Return the mask of x [n, ...] for the samples of this forward pass, bool, of a shape that broadcasts to x's."""
        samples = _for_compiled[0] if torch.compiler.is_compiling() else _samples.get()
        if samples is None:
            raise ValueError(
                f"{self._label()}: training needs the keys of its samples; call the model inside use_sample_keys(keys), "
                "without recomputing activations in the backward pass"
            )
        self._check(x, len(samples.keys))
        use = samples.uses.get(self.name, 0)
        samples.uses[self.name] = use + 1
        units = x.shape[1 : {"sample": 1, "channel": 2, "element": x.dim()}[self.per]]
        kept = self.kept(samples.keys, math.prod(units), use=use)
        return kept.view(len(x), *units, *(1,) * (x.dim() - 1 - len(units)))

    def _check(self, x: Tensor, samples: int) -> None:
        least = 2 if self.per == "channel" else 1
        if x.dim() < least or (self.dims and x.dim() != self.dims):
            raise InputError(
                f"{self._label()}: an input of shape {list(x.shape)} has no batch dimension, which a mask needs; pass "
                f"{self.dims or f'at least {least}'} dimensions, the batch first, or set p = 0"
            )
        if len(x) != samples:
            raise InputError(
                f"{self._label()}: an input of shape {list(x.shape)} for {samples} samples; a mask needs the samples in "
                "dimension 0: move them there, e.g. by batch_first=True, or set p = 0"
            )

    def _label(self) -> str:
        return f"{self.name} ({self.replaces})"

    def extra_repr(self) -> str:
        return f"p={self.p}, per={self.per}, name={self.name}"


class KeyedAlphaDropout(KeyedDropout):
    """In training, sets units to SELU's negative limit with probability `p`, then restores mean 0 and variance 1.

    torch's AlphaDropout and, per channel, FeatureAlphaDropout (Klambauer et al. 2017, arXiv 1706.02515).
    """

    def __init__(self, p: float, *, name: str, **options: Any) -> None:
        super().__init__(p, name=name, **options)
        limit, dropped = 1.7580993408473766, self.threshold / 65536
        self.scale = ((limit**2 * dropped + 1) * (1 - dropped)) ** -0.5
        self.step = limit * self.scale
        self.offset = self.step * (dropped - 1)

    def _apply_mask(self, x: Tensor, kept: Tensor) -> Tensor:
        mask = kept.to(x.dtype)
        y = _times(x, mask * self.scale, inplace=self.inplace)
        return y.add_(mask * self.step + self.offset)


class _UnitKeys:
    """The keys of a layer's units, computed once per number of units, use and device."""

    _MOST = 8  # others, e.g. of inputs of varying length, are computed at each call

    def __init__(self, name: str) -> None:
        self._words = rng.layer_words(name)
        self._stored: dict[tuple[int, int, torch.device], Tensor] = {}

    def get(self, like: Tensor, count: int, use: int) -> Tensor:
        """Return `rng.unit_keys` for `count` units at use number `use`, on the device of `like`."""
        device = like.device
        if torch.compiler.is_compiling() or type(like) is not Tensor:  # part of the graph, or a stand-in for a tensor
            return rng.unit_keys(self._words, count, use=use, device=device)
        stored = self._stored.get((count, use, device))
        if stored is not None:  # never removed, because a CUDA graph may read it
            return stored
        keys = rng.unit_keys(self._words, count, use=use, device=device)
        if len(self._stored) < self._MOST and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # other streams will read it
            self._stored[count, use, device] = keys
        return keys


def _times(x: Tensor, factor: Tensor | float, *, inplace: bool) -> Tensor:
    return x.mul_(factor) if inplace else x * factor
