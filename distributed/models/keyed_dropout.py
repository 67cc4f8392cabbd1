"""Dropout with a mask computed from (seed, epoch, sample id, layer): the same on any rank, device and attempt."""

from torch import Tensor, nn

from distributed import rng


class KeyedDropout(nn.Module):
    """In training, zeroes each unit with probability `p` and scales the others by 1 / (1 - p).

    Args:
        p: dropout probability in [0, 1), rounded to a multiple of 1/65536.
        features: units per sample.
        name: distinguishes the masks of several layers.
    """

    units: Tensor

    def __init__(self, p: float, *, features: int, name: str) -> None:
        super().__init__()
        self.features = features
        self.threshold = min(65535, round(p * 65536))
        self.scale = 65536 / (65536 - self.threshold)
        self.register_buffer("units", rng.unit_keys(name, features), persistent=False)

    def kept(self, sample_keys: Tensor) -> Tensor:
        """Return the mask of kept units, bool [n, features], for sample keys int64 [n, 2]."""
        return rng.uniform16(sample_keys, self.units)[:, : self.features] >= self.threshold

    def forward(self, x: Tensor, sample_keys: Tensor | None) -> Tensor:
        """Apply dropout to x [n, features].

        Args:
            sample_keys: int64 [n, 2] from `rng.sample_keys`; required in training.

        Raises:
            ValueError: training without sample_keys.
        """
        if not self.training or not self.threshold:
            return x
        if sample_keys is None:
            raise ValueError("KeyedDropout: training needs sample_keys, from which the mask is computed")
        return x * self.scale * self.kept(sample_keys)

    def extra_repr(self) -> str:
        return f"p={self.threshold / 65536}, features={self.features}"
