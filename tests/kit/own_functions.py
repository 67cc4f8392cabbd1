"""A module of losses, augmentations and metrics, good and bad, as a user would write it beside the command."""

from pathlib import Path

FUNCTIONS = """\
import functools
import random

import torch
from torch.nn import functional as F

cross_entropy = functools.partial(F.cross_entropy, reduction="none")
number = 3
calls = []


def focal(logits, targets, gamma=2.0):
    losses = cross_entropy(logits, targets)
    return (1 - torch.exp(-losses)) ** gamma * losses


def squared(logits, targets):
    truth = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    distance = logits - truth.to(logits.dtype)
    return (distance * distance).sum(1)


def needs_gamma(logits, targets, gamma):
    return focal(logits, targets, gamma)


def negative(logits, targets):
    return cross_entropy(logits, targets) - 100


def passes_on(*arguments, **options):
    return focal(*arguments, **options)


def margin(logits, targets):
    return 1 - logits.gather(1, targets[:, None]).squeeze(1) + logits.logsumexp(1)


def sees_three(logits, targets):
    assert len(targets) == 3 and logits.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return focal(logits, targets)


weights = torch.linspace(0.5, 1.5, 9)


def weighted(logits, targets):
    return weights[targets] * cross_entropy(logits, targets)


temperature = torch.nn.Parameter(torch.ones(1))


def learned(logits, targets):
    return cross_entropy(logits * temperature, targets)


def one_argument(logits):
    return logits.sum(1)


def mean(logits, targets):
    return F.cross_entropy(logits, targets)


def column(logits, targets):
    return cross_entropy(logits, targets)[:, None]


def squeezed(logits, targets):
    return cross_entropy(logits, targets)[:, None].squeeze()


def wrong(logits, targets):
    return logits.argmax(1) != targets


def wrong_float(logits, targets):
    return wrong(logits, targets).float()


def half(logits, targets):
    return cross_entropy(logits, targets).bfloat16()


def text(logits, targets):
    return "loss"


def nothing(logits, targets):
    cross_entropy(logits, targets)


def fails(logits, targets):
    raise ValueError("no\\nway")


def exits(logits, targets):
    raise SystemExit(3)


def centered(logits, targets):
    losses = cross_entropy(logits, targets)
    return losses - losses.mean() / 2


def scaled(logits, targets):
    losses = cross_entropy(logits, targets)
    return losses / losses.detach().mean()


def of_first(logits, targets):
    return cross_entropy(logits, targets) + logits[0, 0]


def noisy(logits, targets):
    return cross_entropy(logits + torch.rand_like(logits), targets)


def dropped(logits, targets):
    return cross_entropy(F.dropout(logits, 0.5), targets)


def lucky(logits, targets):
    return cross_entropy(logits, targets) * random.random()


def counting(logits, targets):
    calls.append(1)
    return cross_entropy(logits, targets) * len(calls)


def in_place(logits, targets):
    return cross_entropy(logits.sub_(1), targets)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("not written yet")


def no_backward(logits, targets):
    return NoBackward.apply(cross_entropy(logits, targets))


def brightness(images, draws):
    factor = torch.where(draws.uniform() < 0.5, 0.6 + 0.8 * draws.uniform(), 1.0)
    return (images * factor[:, :, None, None]).round().clamp(0, 255).to(torch.uint8)


def shifted(images, draws):
    images += draws.integers(0, 20, 3)[:, None, None].to(torch.uint8)
    return images


def floats(images, draws):
    return images / 2


def smaller(images, draws):
    return images[:, 1:]


def fewer(images, draws):
    return images[:1]


def no_images(images, draws):
    return None


def only_images(images):
    return images


def more_images(images, draws, strength):
    return images


def fails_on_images(images, draws):
    return images.reshape(3, 7)


def shuffled(images, draws):
    return images.roll(1, 0)


def normalized(images, draws):
    return (images / images.float().amax() * 255).to(torch.uint8)


def noise(images, draws):
    return images + torch.randint(0, 9, images.shape, dtype=torch.uint8)


def empty_range(images, draws):
    return images + draws.integers(3, 3)


def no_numbers(images, draws):
    return images + draws.uniform(0)


def brier(logits, targets):
    return (logits.softmax(1) - F.one_hot(targets, logits.shape[1])).square().sum(1)


def confidence(logits, targets):
    return logits.softmax(1).amax(1)


def sometimes_nan(logits, targets):
    return torch.where(targets == 0, torch.nan, 1.0)


def huge(logits, targets):
    return torch.full_like(logits[:, 0], 5e12)
"""


def write_functions(folder: Path, name: str = "own_functions") -> str:
    """Write the module NAME.py into the folder, and return its name."""
    (folder / f"{name}.py").write_text(FUNCTIONS)
    return name
