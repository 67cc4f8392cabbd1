"""Settings that images of a size are too small for."""

import pytest
from kit.configs import config_of


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
    ],
)  # fmt: skip
def test_what_is_reflected_must_fit_into_the_image(settings, size, refused):
    found = config_of("--data.name", "arrays", *settings).size_conflicts(*size)
    assert (refused in found[0]) if refused else not found
