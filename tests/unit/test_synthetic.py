import hashlib

import numpy as np
import pytest
import torch

from distributed.data.sources import synthetic


@pytest.mark.parametrize(
    ("name", "split", "digest"),
    [
        ("generated10", "train", "22bbf5e44d68e0c759ddfa1a4c1c8fa0"),
        ("generated10", "test", "1e36362e1e2d40223680d50a773af219"),
        ("generated100", "train", "331b27a9161b6b3c3edba781f878c8a3"),
        ("generated100", "test", "4212f70ba50691ce1e3900fdc8520247"),
    ],
)
def test_the_images_equal_the_stored_digest(name, split, digest):
    images, labels = synthetic.read(name, 4, split)
    assert images.shape == (4, 32, 32, 3)
    assert images.dtype == labels.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3]
    assert hashlib.blake2b(images.transpose(0, 3, 1, 2).tobytes(), digest_size=16).hexdigest() == digest


@pytest.mark.parametrize(("name", "classes"), [("generated10", 10), ("generated100", 100)])
def test_labels_are_balanced(name, classes):
    labels = synthetic.read(name, 300, "train").labels
    assert np.bincount(labels, minlength=classes).tolist() == [300 // classes] * classes


def test_a_smaller_set_is_a_prefix_of_a_larger_one(monkeypatch):
    full = synthetic.read("generated10", 50, "train").images
    monkeypatch.setattr(synthetic, "_CHUNK", 16)
    assert np.array_equal(synthetic.read("generated10", 50, "train").images, full)
    assert np.array_equal(synthetic.read("generated10", 21, "train").images, full[:21])


def test_all_images_of_both_splits_differ():
    both = [synthetic.read("generated10", 200, split).images for split in ("train", "test")]
    assert len(np.unique(np.concatenate(both).reshape(400, -1), axis=0)) == 400


def test_pixels_use_the_full_range():
    images = synthetic.read("generated10", 100, "train").images
    assert images.min() < 20
    assert images.max() > 235
    assert 25 < images.std() < 100


def test_a_linear_model_stays_under_40_percent():
    train, test = synthetic.read("generated10", 5000, "train"), synthetic.read("generated10", 1000, "test")
    x, held_out = (torch.from_numpy(s.images).view(-1, 3072).float().div(255).sub(0.5) for s in (train, test))
    y = torch.nn.functional.one_hot(torch.from_numpy(train.labels).long(), 10).float()
    weights, residual = torch.zeros(3072, 10), x.T @ (y - 0.1)
    direction, best = residual, 0.0
    for _ in range(8):  # conjugate gradients on the normal equations; each iterate is a regularized solution
        curved = x.T @ (x @ direction)
        step = residual.square().sum(0) / (direction * curved).sum(0)
        weights = weights + step * direction
        smaller = residual - step * curved
        direction = smaller + smaller.square().sum(0) / residual.square().sum(0) * direction
        residual = smaller
        answers = (held_out @ weights).argmax(1)
        best = max(best, float((answers == torch.from_numpy(test.labels)).double().mean()))
    trained = float(((x @ weights).argmax(1) == torch.from_numpy(train.labels)).double().mean())
    assert trained > 0.3  # the linear model did learn something
    assert best < 0.4
