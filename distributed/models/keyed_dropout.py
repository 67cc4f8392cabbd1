"""Dropout whose mask is a function of (seed, epoch, sample id, layer), the same on any rank, device and attempt."""

from torch import Tensor, nn

from distributed import rng


class KeyedDropout(nn.Module):
    """Zeroes a unit with probability `p` (in steps of 1/65536) and scales the others by 1 / (1 - p), in training only.

    Args:
        p: probability of dropping a unit, in [0, 1).
        features: units a sample.
        name: tells the masks of several layers apart.
    """

    units: Tensor

    def __init__(self, p: float, *, features: int, name: str) -> None:
        super().__init__()
        self.features = features
        self.threshold = min(65535, round(p * 65536))
        self.scale = 65536 / (65536 - self.threshold)
        self.register_buffer("units", rng.unit_keys(name, features), persistent=False)

    def kept(self, sample_keys: Tensor) -> Tensor:
        """The mask of kept units: bool [n, features], from keys int64 [n, 2]."""
        return rng.uniform16(sample_keys, self.units)[:, : self.features] >= self.threshold

    def forward(self, x: Tensor, sample_keys: Tensor | None) -> Tensor:
        """x: [n, features]; sample_keys: int64 [n, 2] of `keyed.sample_keys`, needed in training."""
        if not self.training or not self.threshold:
            return x
        if sample_keys is None:
            raise ValueError("dropout in training needs sample_keys, by which its mask is computed")
        return x * self.scale * self.kept(sample_keys)

    def extra_repr(self) -> str:
        return f"p={self.threshold / 65536}, features={self.features}"
