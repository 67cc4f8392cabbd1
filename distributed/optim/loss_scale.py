"""Loss scaling for float16, whose smallest numbers are larger than many gradients (Micikevicius et al. 2018, arXiv 1710.03740).

The loss is multiplied by a power of two before the backward pass and gradients are divided by it after their sum over ranks.
Where one of them is not finite the step is skipped and the scale halved; after many good steps it is doubled. Everything is
decided on the device, from numbers that all ranks have alike.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

PREFIX = "scaler."
START, GOOD_STEPS = 2.0**16, 2000
LEAST, MOST = 2.0**-24, 2.0**64  # so that neither end is ever reached from which a factor leads back no more


class LossScale:
    """The scale, a float32 scalar, and how many steps in a row were good since it was changed."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, overflow: Tensor) -> None:
        """After a step: 1.0 where its gradient was not finite, else 0.0."""
        good = (self.good_steps + 1) * (overflow == 0)
        grows = good == GOOD_STEPS
        factor = torch.where(overflow != 0, 0.5, torch.where(grows, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(LEAST, MOST)
        self.good_steps.copy_(good * ~grows)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{PREFIX}scale", self.scale
        yield f"{PREFIX}good_steps", self.good_steps

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; without it, as at the start."""
        self.scale.copy_(tensors.get(f"{PREFIX}scale", torch.tensor(START)))
        self.good_steps.copy_(tensors.get(f"{PREFIX}good_steps", torch.tensor(0)))
