"""Dynamic loss scaling for float16, in which small gradients would underflow (Micikevicius et al. 2018, arXiv 1710.03740).

The loss is multiplied by a power of two before the backward pass, and gradients are divided by it after their sum over ranks.
If a gradient is not finite, the step is skipped and the scale is halved; after many finite steps in a row it is doubled. All
decisions are made on the device from values that are identical on all ranks.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

PREFIX = "scaler."
INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000
MIN_SCALE, MAX_SCALE = 2.0**-24, 2.0**64  # well inside float32's range: at 0 or inf no factor could recover the scale


class LossScale:
    """The scale, a float32 scalar on the device, and the number of finite steps in a row since it last changed."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, overflow: Tensor) -> None:
        """Adjust the scale after a step. `overflow` is 1.0 if a gradient was not finite, else 0.0."""
        good = (self.good_steps + 1) * (overflow == 0)
        grows = good == GROWTH_INTERVAL
        factor = torch.where(overflow != 0, 0.5, torch.where(grows, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(MIN_SCALE, MAX_SCALE)
        self.good_steps.copy_(good * ~grows)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{PREFIX}scale", self.scale
        yield f"{PREFIX}good_steps", self.good_steps

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` yielded; tensors that are missing return to their initial values."""
        self.scale.copy_(tensors.get(f"{PREFIX}scale", torch.tensor(INITIAL_SCALE)))
        self.good_steps.copy_(tensors.get(f"{PREFIX}good_steps", torch.tensor(0)))
