"""Settings that need images of a minimum size. Imports no torch."""

from distributed.config.data import Augment
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
            f"data.augment.low_res_side = {augment.low_res_side} is no reduction of images of {height} x {width} pixels: set "
            "it to less, or remove it and data.augment.low_res_epochs"
        )
    if evaluation.shift_tta >= side:
        found.append(
            f"evaluation.shift_tta = {evaluation.shift_tta} is too much for images of {height} x {width} pixels: set it to "
            f"{side - 1} or less"
        )
    return found
