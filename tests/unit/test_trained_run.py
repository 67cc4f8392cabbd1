from pathlib import Path

import pytest
import torch
from kit.arrays import arrays_of, write_arrays
from kit.own_networks import write_networks
from kit.user_modules import importable

from distributed import load, load_config
from distributed.build import build_data
from distributed.config import TrainConfig
from distributed.data.sources.decode import to_size
from distributed.inference.saved_run import Normalization
from distributed.inference.trained_run import Classifier, TrainedRun, resize
from distributed.models.build import build_model
from distributed.recipe import train
from distributed.topology import Topology
from distributed.training.views import Views


def test_the_centre_square_is_scaled_to_the_size() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, :, 10:50] = 255  # the centre square; nothing outside of it may count
    found = resize(image, (32, 32))
    assert found.shape == (1, 3, 32, 32)
    torch.testing.assert_close(found[..., 1:-1], torch.ones(1, 3, 32, 30))  # at the border the filter reaches beyond


def test_images_of_the_right_size_are_unchanged() -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(resize(images, (32, 32)), images / 255)


def test_scaling_down_uses_antialiasing() -> None:
    stripes = (torch.arange(256) % 2 * 255).byte().expand(3, 256, 256)
    assert (resize(stripes, (32, 32)) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)]
)
def test_images_of_another_type_or_shape_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"should be torch.uint8 \[n, 3, height, width\] or \[3, height, width\]"):
        resize(images, (32, 32))


def test_predictions_are_the_networks_on_normalized_pixels() -> None:
    config, normalization = TrainConfig(), Normalization([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    network = build_model(config.model, num_classes=10, seed=0)
    trained = TrainedRun(
        config, Path("x"), Classifier(network, normalization), list("abcdefghij"), normalization, (32, 32), (3, 32, 32)
    )
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    with torch.no_grad():
        expected = trained.network((images / 255 - mean) / deviation)
        assert torch.equal(trained.classifier(images / 255), expected)
    assert torch.equal(trained.preprocess(images), (images / 255 - mean) / deviation)
    assert torch.equal(trained.predict(images), expected.softmax(1))
    assert not trained.network.training


@pytest.mark.parametrize(
    ("shape", "model", "input_shape"),
    [
        ((12, 18, 3), {}, (3, 12, 18)),
        ((12, 12, 3), {"name": "own_networks:make", "input_side": 20}, (3, 20, 20)),
    ],
    ids=["not square", "resized"],
)
def test_images_are_prepared_as_for_training(
    shape: tuple[int, ...], model: dict[str, object], input_shape: tuple[int, ...], tmp_path: Path
) -> None:
    """A built-in network stretches images, so nothing may be cropped before; resized pixels are not rounded.

    Larger images are scaled to the size of the stored ones first: otherwise they would be sharper than in training.
    """
    write_networks(tmp_path)
    arrays, root = arrays_of(shape), write_arrays(tmp_path / "a", shape)
    config = load_config(
        run_dir=tmp_path / "run", data={"name": "arrays", "root": root}, epochs=1, global_batch_size=16, optim={"lr": 0.01},
        precision="float32", device="cpu", threads=1, logging={"tensorboard": False, "curves": False}, model=model,
        evaluation={"flip_tta": True, "shift_tta": 1},
    )  # fmt: skip
    with importable(tmp_path):
        train(config)
        trained = load(tmp_path / "run")
    assert trained.input_shape == input_shape
    images = torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2)
    batch = next(build_data(config, Topology(), torch.device("cpu")).evaluation("test"))
    torch.testing.assert_close(trained.preprocess(images), batch.images)
    with torch.no_grad():
        expected = Views(flip=True, shift=1).average(trained.network, batch.images).softmax(1)
    torch.testing.assert_close(trained.predict(images), expected[: len(images)])
    large = torch.randint(256, (3, 10 * shape[0], 10 * shape[1]), dtype=torch.uint8)
    small = to_size(large, shape[0], shape[1]).permute(2, 0, 1)
    assert torch.equal(trained.preprocess(large), trained.preprocess(small))
