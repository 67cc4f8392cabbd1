from pathlib import Path

import pytest
import torch

from distributed.config import TrainConfig
from distributed.inference.saved_run import Normalization
from distributed.inference.trained_run import Classifier, TrainedRun, resize
from distributed.models.build import build_model


def test_the_centre_square_is_scaled_to_the_size() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, :, 10:50] = 255  # the centre square; nothing outside of it may count
    found = resize(image, 32)
    assert found.shape == (1, 3, 32, 32)
    torch.testing.assert_close(found[..., 1:-1], torch.ones(1, 3, 32, 30))  # at the border the filter reaches beyond


def test_images_of_the_right_size_are_unchanged() -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(resize(images, 32), images / 255)


def test_scaling_down_uses_antialiasing() -> None:
    stripes = (torch.arange(256) % 2 * 255).byte().expand(3, 256, 256)
    assert (resize(stripes, 32) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)]
)
def test_images_of_another_type_or_shape_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"should be torch.uint8 \[n, 3, height, width\] or \[3, height, width\]"):
        resize(images, 32)


def test_predictions_are_the_networks_on_normalized_pixels() -> None:
    config, normalization = TrainConfig(), Normalization([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    network = build_model(config.model, num_classes=10, seed=0)
    trained = TrainedRun(
        config, Path("x"), Classifier(network, normalization), list("abcdefghij"), normalization, (3, 32, 32)
    )
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    with torch.no_grad():
        expected = trained.network((images / 255 - mean) / deviation)
        assert torch.equal(trained.classifier(images / 255), expected)
    assert torch.equal(trained.preprocess(images), (images / 255 - mean) / deviation)
    assert torch.equal(trained.predict(images), expected.softmax(1))
    assert not trained.network.training
