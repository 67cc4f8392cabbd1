"""Settings that images of a size are too small for."""

import pytest
from kit.configs import config_of

OWN = ("--model.name", "net:net")
LOW_RES = ["--data.augment.low_res_epochs", "1", "--data.augment.low_res_side"]


@pytest.mark.parametrize(
    ("settings", "size", "refused"),
    [
        (["--data.augment.crop", "12", "--data.augment.crop_padding", "reflect"], (40, 12), "data.augment.crop = 12"),
        (["--data.augment.crop", "11", "--data.augment.crop_padding", "reflect"], (40, 12), None),
        (["--data.augment.crop", "12"], (40, 12), None),
        (["--evaluation.shift_tta", "12"], (12, 40), "evaluation.shift_tta = 12"),
        (["--evaluation.shift_tta", "11"], (12, 40), None),
        (["--evaluation.shift_tta", "12", "--model.name", "net:net", "--model.input_side", "16"], (12, 40), None),
        (["--evaluation.shift_tta", "16", "--model.name", "net:net", "--model.input_side", "16"], (40, 40), "16 x 16"),
        ([*LOW_RES, "12", *OWN], (40, 12), "data.augment.low_res_side = 12 does not make images of 40 x 12 pixels smaller"),
        ([*LOW_RES, "11", *OWN], (40, 12), None),
        ([*LOW_RES, "20", "--model.name", "net:net", "--model.input_side", "16"], (40, 40), "16 x 16"),
    ],
)  # fmt: skip
def test_settings_must_fit_the_size_of_the_images(settings, size, refused):
    found = config_of("--data.name", "arrays", *settings).size_conflicts(*size)
    assert (refused in found[0]) if refused else not found
