"""An augmentation function of the user's, by import path, and the random numbers that it draws."""

from functools import cache

import torch
from torch import Tensor

from distributed import rng
from distributed.config.user_code import UserFunction, described, type_name
from distributed.errors import InputError

SETTING = "data.augment.function"
_MOST = 2**31


class Draws:
    """Random numbers for some images, one row per image, computed from (seed, epoch, image) and not stored.

    A row does not depend on the other images, nor on the number of processes. Each call draws new numbers: the second call
    for an image returns different numbers.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys, self._calls = keys, 0

    def uniform(self, k: int = 1) -> Tensor:
        """Draw k numbers per image, uniform in [0, 1): float32 [n, k]."""
        return (self._next(k) >> 8).to(torch.float32) * 2.0**-24

    def integers(self, low: int, high: int, k: int = 1) -> Tensor:
        """Draw k integers per image, uniform in [low, high): int64 [n, k].

        Raises:
            ValueError: the range is empty, or has more than 2**31 integers.
        """
        if not 0 < high - low <= _MOST:
            raise ValueError(f"draws.integers({low}, {high}): high should be above low, by at most 2**31")
        return (self._next(k) * (high - low) >> 32) + low

    def _next(self, k: int) -> Tensor:
        """Return numbers uniform in [0, 2**32), int64 [n, k]."""
        if k < 1:
            raise ValueError(f"draws of {k} numbers per image: draw at least 1")
        purposes = _purposes(self._calls, k)
        self._calls += 1
        return rng.draws_of_each(self._keys, purposes).T.contiguous()


@cache
def _purposes(call: int, k: int) -> tuple[str, ...]:
    return tuple(f"augment.function {call} {column}" for column in range(k))


class AugmentFunction:
    """Calls the function of an import path on uint8 images.

    Raises:
        InputError: it cannot be imported, or needs other arguments.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        user = UserFunction(
            setting=SETTING, path=path, noun="function", result="the changed images", positional=("images", "draws")
        )
        self._function = user.load()

    def __call__(self, images: Tensor, keys: Tensor, sizes: list[int]) -> Tensor:
        """Return the changed images, in one call per shard, on a copy of its images.

        The last elements of a tensor may be rounded differently from the others, and a rank's number of shards depends on
        the number of ranks. A shard's images do not.

        Args:
            images: uint8 [n, h, w, c].
            keys: int64 [n, 2].
            sizes: number of images in each shard; their sum is n.

        Raises:
            InputError: the function raises an error, or returns something else than such images.
        """
        shards = zip(torch.split(images, sizes), torch.split(keys, sizes), strict=True)
        changed = [self._call(some.clone(), Draws(theirs)) for some, theirs in shards if len(theirs)]
        return torch.cat(changed) if changed else images

    def _call(self, images: Tensor, draws: Draws) -> Tensor:
        shape, device, start = images.shape, images.device, f"{SETTING} = {self.path}"
        called = f"images of shape {list(shape)}"
        try:
            with torch.no_grad():
                changed = self._function(images, draws)
        except Exception as error:
            raise InputError(f"{start}: the function fails on {called}: {described(error)}") from error
        if isinstance(changed, Tensor) and (changed.shape, changed.dtype) == (shape, torch.uint8):
            if changed.device == device:
                return changed
            raise InputError(f"{start}: the function returns images on {changed.device}; leave them on {device}")
        found = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type_name(changed)
        raise InputError(
            f"{start}: the function returns {found} for {called}; it should return torch.uint8 {list(shape)}"
        )
