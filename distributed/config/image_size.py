"""Conflicts of settings with the size of the images. Imports no torch."""

from distributed.config.data import Augment
from distributed.config.models import AnyModel, FastAlexNet
from distributed.config.sections import Evaluation


def size_conflicts(
    augment: Augment, evaluation: Evaluation, height: int, width: int, *, resized_side: int | None
) -> list[str]:
    """Return one line, with its remedy, for each setting that needs larger images.

    Args:
        height, width: of the stored images, in pixels.
        resized_side: height and width that the network takes, if the images are resized to it after augmentation.
    """
    found = []
    side = min(height, width)
    if augment.crop_padding == "reflect" and augment.crop >= side:
        found.append(
            f"data.augment.crop = {augment.crop} with crop_padding = reflect is too much for images of {height} x {width} "
            f"pixels: set it to {side - 1} or less, or crop_padding = zero"
        )
    if resized_side:
        side = height = width = resized_side
    if augment.low_res_side is not None and augment.low_res_side >= side:
        found.append(
            f"data.augment.low_res_side = {augment.low_res_side} does not make images of {height} x {width} pixels smaller: "
            f"set it to {side - 1} or less, or remove it and data.augment.low_res_epochs"
        )
    if evaluation.shift_tta >= side:
        found.append(
            f"evaluation.shift_tta = {evaluation.shift_tta} is too much for images of {height} x {width} pixels: set it to "
            f"{side - 1} or less"
        )
    return found


def low_res_conflicts(augment: Augment, model: AnyModel, epochs: int) -> list[str]:
    """Return one line, with its remedy, for each reason why the first epochs cannot train in low resolution."""
    side, found = augment.low_res_side, []
    if augment.low_res_epochs and side is None:
        return [
            f"data.augment.low_res_epochs = {augment.low_res_epochs} needs data.augment.low_res_side: set it to the height and "
            "width in pixels of these epochs, e.g. 24"
        ]
    if side is not None and not augment.low_res_epochs:
        return [
            f"data.augment.low_res_side = {side} has no effect with data.augment.low_res_epochs = 0: remove it or set "
            "data.augment.low_res_epochs"
        ]
    if augment.low_res_epochs >= epochs:
        found.append(
            f"data.augment.low_res_epochs = {augment.low_res_epochs} must be less than epochs = {epochs}, or no epoch trains "
            "on images of the full size: lower it"
        )
    if isinstance(model, FastAlexNet) and side is not None and not 16 <= side < 32:
        found.append(
            f"data.augment.low_res_side = {side} is not possible with model.name = fast_alexnet: set it to 16 to 31"
        )
    return found
