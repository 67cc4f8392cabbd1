import hashlib

import numpy as np
import pytest

from distributed.data.split import validation_mask

LABELS = (np.arange(1000) % 10).astype(np.uint8)


def test_the_same_fraction_of_every_class_is_held_out():
    mask = validation_mask(LABELS, fraction=0.2, seed=0)
    assert np.bincount(LABELS[mask]).tolist() == [20] * 10
    assert np.bincount(LABELS[~mask]).tolist() == [80] * 10


def test_each_class_is_rounded_separately():
    labels = np.array([0] * 10 + [1] * 7 + [2] * 1, np.uint8)
    mask = validation_mask(labels, fraction=0.2, seed=0)
    assert np.bincount(labels[mask], minlength=3).tolist() == [2, 1, 0]


def test_nothing_is_held_out_at_zero():
    assert not validation_mask(LABELS, fraction=0, seed=0).any()


def test_the_split_equals_the_stored_one():
    held_out = np.flatnonzero(validation_mask(LABELS, fraction=0.2, seed=0))
    assert held_out[:8].tolist() == [0, 13, 14, 17, 18, 19, 26, 43]
    assert hashlib.blake2b(held_out.astype("<i8").tobytes(), digest_size=8).hexdigest() == "21b15312f239b184"


def test_another_seed_holds_out_other_images():
    masks = [validation_mask(LABELS, fraction=0.2, seed=seed) for seed in (0, 1)]
    assert 20 < (masks[0] & masks[1]).sum() < 60  # 40 by chance


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_a_larger_fraction_includes_a_smaller_one(fraction):
    smaller, larger = (validation_mask(LABELS, fraction=f, seed=0) for f in (fraction, fraction + 0.2))
    assert not (smaller & ~larger).any()


def test_held_out_images_are_spread_over_the_set():
    mask = validation_mask(np.zeros(1000, np.uint8), fraction=0.2, seed=0)
    assert all(10 < part.sum() < 30 for part in np.split(mask, 10))
