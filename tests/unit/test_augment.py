import pytest
import torch
from torch.nn import functional as F

from distributed import rng
from distributed.config.data import Augment
from distributed.data.augment import alternating_flips, augment, choose, crop, cut_out


def images_of(count: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, *(shape or (32, 32, 3))), dtype=torch.uint8, generator=generator)


def keys_of(count: int, *, epoch: int = 0) -> torch.Tensor:
    return rng.sample_keys(torch.arange(count), seed=0, epoch=epoch)


@pytest.mark.parametrize("padding", [0, 1, 4, 16])
def test_crops_equal_those_made_one_by_one(padding):
    images = images_of(20)
    generator = torch.Generator().manual_seed(0)
    down, across = torch.randint(0, 2 * padding + 1, (2, 20), generator=generator)
    down[:2], across[:2] = torch.tensor([0, 2 * padding]), torch.tensor([2 * padding, 0])
    expected = torch.zeros_like(images)
    for i, image in enumerate(images):
        padded = torch.zeros(32 + 2 * padding, 32 + 2 * padding, 3, dtype=torch.uint8)
        padded[padding : padding + 32, padding : padding + 32] = image
        expected[i] = padded[down[i] : down[i] + 32, across[i] : across[i] + 32]
    assert torch.equal(crop(images, padding, down, across), expected)


@pytest.mark.parametrize("padding", [1, 2, 31])
def test_reflected_borders_are_those_of_torchs_padding(padding):
    images = images_of(12)
    down, across = torch.randint(0, 2 * padding + 1, (2, 12), generator=torch.Generator().manual_seed(0))
    padded = F.pad(images.permute(0, 3, 1, 2).float(), (padding,) * 4, mode="reflect").to(torch.uint8)
    found = crop(images, padding, down, across, reflect=True)
    for i in range(12):
        window = padded[i, :, down[i] : down[i] + 32, across[i] : across[i] + 32]
        assert torch.equal(found[i], window.permute(1, 2, 0))


def test_alternating_flip_mirrors_in_every_other_epoch():
    ids, config = torch.arange(1000), Augment(flip="alternating")
    epochs = [alternating_flips(ids, config, seed=0, epoch=epoch) for epoch in range(4)]
    assert torch.equal(epochs[0], ~epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert 450 < epochs[0].sum() < 550
    assert not torch.equal(epochs[0], alternating_flips(ids, config, seed=1, epoch=0))
    assert torch.equal(alternating_flips(ids[300:310].flip(0), config, seed=0, epoch=0), epochs[0][300:310].flip(0))


def test_random_flips_are_drawn_anew_in_each_epoch():
    images = images_of(50)
    first, second = (augment(images, keys_of(50, epoch=epoch), Augment(crop=0)) for epoch in (0, 1))
    assert alternating_flips(torch.arange(50), Augment(), seed=0, epoch=0) is None
    assert not torch.equal(first, second)


def test_given_images_are_mirrored():
    images, chosen = images_of(3), torch.tensor([True, False, True])
    found = augment(images, keys_of(3), Augment(crop=0, flip="alternating"), mirrored=chosen)
    assert torch.equal(found, torch.stack([images[0].flip(1), images[1], images[2].flip(1)]))


def test_a_crop_of_the_last_window_stays_inside_the_batch():
    images = images_of(1)
    cropped = crop(images, 4, torch.tensor([8]), torch.tensor([8]))
    assert torch.equal(cropped[0, :28, :28], images[0, 4:, 4:])
    assert not cropped[0, 28:].any()
    assert not cropped[0, :, 28:].any()


@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 3, 3)])
def test_choose_selects_entire_images(shape):
    these, others = images_of(6, *shape), images_of(6, *shape) ^ 255
    chosen = torch.tensor([True, False, True, True, False, False])
    result = choose(chosen, these, others)
    for i in range(6):
        assert torch.equal(result[i], these[i] if chosen[i] else others[i])


def test_choose_reads_images_of_any_layout():
    images = images_of(4)
    result = choose(torch.tensor([True, False, True, False]), images.flip(2), images)
    assert torch.equal(result[0], images[0].flip(1))
    assert torch.equal(result[1], images[1])


def test_about_half_of_the_images_are_mirrored():
    images = images_of(200)
    result = augment(images, keys_of(200), Augment(crop=0))
    mirrored = [torch.equal(result[i], images[i].flip(1)) for i in range(200)]
    assert all(m or torch.equal(result[i], images[i]) for i, m in enumerate(mirrored))
    assert 70 < sum(mirrored) < 130


def test_crop_and_flip_are_drawn_from_the_keys():
    images, keys = images_of(40), keys_of(40)
    cropped = crop(images, 4, rng.integers(keys, "crop_y", 9), rng.integers(keys, "crop_x", 9))
    expected = torch.where(rng.integers(keys, "flip", 2).bool().view(-1, 1, 1, 1), cropped.flip(2), cropped)
    assert torch.equal(augment(images, keys, Augment()), expected)


def test_without_augmentation_images_are_unchanged():
    images = images_of(5)
    assert torch.equal(augment(images, keys_of(5), Augment(crop=0, flip=False)), images)


def test_augmentation_depends_on_sample_and_epoch_only():
    images = images_of(30)
    full = augment(images, keys_of(30), Augment())
    assert torch.equal(augment(images[11:14], keys_of(30)[11:14], Augment()), full[11:14])
    assert not torch.equal(augment(images, keys_of(30, epoch=1), Augment()), full)


def test_augmentation_does_not_modify_its_input():
    images = images_of(10)
    before = images.clone()
    augment(images, keys_of(10), Augment())
    assert torch.equal(images, before)


@pytest.mark.parametrize("side", [1, 4, 7, 32])
def test_cutouts_equal_those_made_one_by_one(side):
    images, keys = torch.randn(30, 32, 32, 3), keys_of(30)
    rows, columns = (rng.integers(keys, purpose, 32).tolist() for purpose in ("cutout_y", "cutout_x"))
    expected = images.clone()
    for i in range(30):
        top, left = rows[i] - side // 2, columns[i] - side // 2
        expected[i, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    assert torch.equal(cut_out(images, keys, side), expected)


@pytest.mark.parametrize("config", [Augment(), Augment(crop=0), Augment(flip=False)])
def test_an_empty_batch_stays_empty(config):
    assert augment(images_of(0), keys_of(0), config).shape == (0, 32, 32, 3)
    assert cut_out(torch.empty(0, 32, 32, 3), keys_of(0), 8).shape == (0, 32, 32, 3)
