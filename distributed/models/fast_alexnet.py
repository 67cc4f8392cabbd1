"""A modern AlexNet for 32 x 32 images: whitened first layer, batch norm, one linear layer. No residual connections.

After the network of Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024, arXiv 2404.00498).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from distributed.models.resize import resize

_PATCH = 2
"""Height and width in pixels of the first convolution."""
_EPS = 5e-4
"""Added to the variances of the patches, so that directions that hardly occur are not amplified without bound."""
_BATCH_NORM_MOMENTUM = 0.4
"""Weight of a batch in the running statistics: a run of ten epochs has a few hundred batches."""

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class FastAlexNet(nn.Module):
    """Images [n, 3, h, w] in, logits [n, num_classes] out. Images of another size than 32 x 32 are resized.

    `low_res_side`: height and width of images that are not resized: those of the first epochs, if they are smaller.

    Args:
        widths: channels of the three blocks.
        whitening: do not train the weights of the first convolution; `set_whitening` sets them.
    """

    def __init__(
        self, num_classes: int, *, widths: tuple[int, int, int], whitening: bool, activation: Literal["relu", "gelu"]
    ) -> None:
        super().__init__()
        self.low_res_side: int | None = None
        nonlinearity = _ACTIVATIONS[activation]
        channels = 2 * 3 * _PATCH**2  # two per pixel of a patch: each direction with both signs
        self.first = nn.Conv2d(3, channels, _PATCH)
        self.first.weight.requires_grad_(not whitening)
        inputs = (channels, *widths)
        self.activation = nonlinearity()
        self.blocks = nn.Sequential(*[_block(*pair, nonlinearity) for pair in zip(inputs, widths, strict=False)])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, num_classes]."""
        x = self.blocks(self.activation(self.first(self.resized(images))))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits

    def resized(self, images: Tensor) -> Tensor:
        """Return images [n, 3, h, w] in the size that the first layer takes."""
        return images if images.shape[2:] == (self.low_res_side, self.low_res_side) else resize(images, 32)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Let the first output channels of each 3x3 convolution copy its input, and all logits be zero."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight[: module.in_channels])
        for name, parameter in self.named_parameters():
            if name in ("first.bias", "head.weight", "head.bias"):
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def set_whitening(self, weight: Tensor) -> None:
        """Set the weights of the first convolution, e.g. to those of `whitening`."""
        self.first.weight.copy_(weight)


def _block(inputs: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """Halve height and width, and compute `outputs` channels."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2), _batch_norm(outputs), activation(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), _batch_norm(outputs), activation(),
    )  # fmt: skip


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm that shifts but does not scale: the next convolution's weights have the scale."""
    layer = nn.BatchNorm2d(channels, momentum=_BATCH_NORM_MOMENTUM)
    layer.weight.requires_grad_(False)
    return layer


def whitening(images: Tensor) -> Tensor:
    """Return weights [24, 3, 2, 2] with which the patches of these images have uncorrelated outputs of variance 1.

    The eigenvectors of the patches' covariance, scaled by the inverse of their deviation, and their negatives. Computed in
    float64, on one thread, so that the result does not depend on the number of threads.

    Args:
        images: normalized, [n, 3, h, w], on the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        patches = images.double().unfold(2, _PATCH, 1).unfold(3, _PATCH, 1)  # [n, 3, rows, columns, 2, 2]
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * _PATCH**2)
        variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
        weight = (directions / (variances + _EPS).sqrt()).T.flip(0).reshape(-1, 3, _PATCH, _PATCH)
        return torch.cat([weight, -weight])
    finally:
        torch.set_num_threads(threads)
