"""Step 2: checks that tensor functions give the CPU's bits on this device, and that layers and updates are close to float64."""

import torch
from torch import Tensor

from distributed import rng
from distributed.config.data import Augment, GeneratedData
from distributed.data.augment import alternating_flips, augment, crop, cut_out
from distributed.data.batch import Batch, Batching, InputFormat, Shards
from distributed.data.mixup import beta, mix
from distributed.data.pipeline import DataPipeline
from distributed.gpu_check import unit_layers, unit_updates
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.differences import differing, error, same_bits
from distributed.training.determinism import make_deterministic
from distributed.training.totals import Totals, TotalsAccumulator

_CPU = torch.device("cpu")


def run(checks: Checks) -> None:
    """Compare the results of each function on the device with those on the CPU."""
    make_deterministic(checks.device, precision="float32")
    _keyed(checks)
    _augmentation(checks)
    _mixing(checks)
    _placements(checks)
    _totals(checks)
    unit_layers.run(checks)
    unit_updates.run(checks)


def _images(checks: Checks) -> tuple[Tensor, Tensor]:
    """Return random uint8 images [n, 32, 32, 3] and sample keys int64 [n, 2], on the CPU."""
    count = 40 if checks.tiny else 512
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return images, rng.sample_keys(torch.arange(count) * 7, seed=2**62, epoch=3)


def _draws(count: int, device: torch.device) -> dict[str, Tensor]:
    keys = rng.sample_keys(torch.arange(count, device=device), seed=2**40 + 5, epoch=7)
    units = rng.unit_keys(rng.layer_words("dropout1"), 513, use=1, device=device)
    return {
        "sample_keys": keys,
        "draws": rng.draws(keys, "flip"),
        "integers": rng.integers(keys, "crop_y", 2**31),
        "unit": rng.unit(keys, "mixup_0_x"),
        "at_least16": rng.at_least16(keys[:300], units, 20_000),
        "permutation": rng.permutation(count, seed=1, epoch=2, device=device),
    }


def _keyed(checks: Checks) -> None:
    with checks.check("keyed random draws equal the CPU's"):
        count = 3_001 if checks.tiny else 200_001
        different = differing(_draws(count, checks.device), _draws(count, _CPU))
        assert not different, different


def _augmentation(checks: Checks) -> None:
    images, keys = _images(checks)
    device_images, device_keys = images.to(checks.device), keys.to(checks.device)
    with checks.check("crop, flip and cutout equal the CPU's"):
        down, across = rng.integers(keys, "crop_y", 9), rng.integers(keys, "crop_x", 9)
        cropped = crop(device_images, 4, down.to(checks.device), across.to(checks.device))
        assert same_bits(cropped, crop(images, 4, down, across)), "crop"
        reflected = Augment(crop=2, crop_padding="reflect")
        for config in (Augment(crop=0), Augment(crop=4, flip=False), Augment(crop=4), reflected):
            found, expected = augment(device_images, device_keys, config), augment(images, keys, config)
            assert same_bits(found, expected), config
        alternating, ids = Augment(flip="alternating"), torch.arange(len(images))
        for epoch in (0, 1):
            found, expected = (
                augment(
                    of,
                    keys_of,
                    alternating,
                    mirrored=alternating_flips(ids.to(of.device), alternating, seed=3, epoch=epoch),
                )
                for of, keys_of in ((device_images, device_keys), (images, keys))
            )
            assert same_bits(found, expected), f"flips of epoch {epoch}"
        for side in (5, 16):
            found, expected = cut_out(device_images.float(), device_keys, side), cut_out(images.float(), keys, side)
            assert same_bits(found, expected), f"cutout of {side} pixels"


def _mixing(checks: Checks) -> None:
    images, keys = _images(checks)
    images, device_keys = images.float() / 255, keys.to(checks.device)
    partners = images.roll(1, 0)
    device_images, device_partners = images.to(checks.device), partners.to(checks.device)
    with checks.check("beta draws equal the CPU's up to rounding") as figures:
        for alpha in (0.2, 1.0):
            figures[f"error at alpha {alpha}"] = error(beta(device_keys, "mixup", alpha), beta(keys, "mixup", alpha))
        assert max(figures.values()) < 1e-13, figures
    for name, config, bound in (
        ("mixup", Augment(mixup=0.8), 1e-6),
        ("cutmix", Augment(cutmix=1.0), 0.0),
        ("mixup and cutmix", Augment(mixup=0.8, cutmix=1.0), 1e-6),
    ):
        with checks.check(f"{name} equals the CPU's") as figures:
            found, expected = (
                mix(device_images, device_partners, device_keys, config),
                mix(images, partners, keys, config),
            )
            figures["images"], figures["labels"] = map(error, found, expected)
            assert max(figures.values()) <= bound, f"bound {bound}"


def _pipeline(checks: Checks, device: torch.device, placement: str) -> DataPipeline:
    samples = 200 if checks.tiny else 2000
    augmentation = Augment(mixup=0.5, cutmix=1.0, cutout=8)
    config = GeneratedData.model_validate(
        {"train_samples": samples, "test_samples": samples // 2, "placement": placement, "augment": augmentation}
    )
    return DataPipeline(
        config,
        Batching(seed=5, global_batch_size=48, grad_accum_steps=2, evaluation_batch_size=70),
        Shards.of_rank(0, 1, 4),
        InputFormat(device, torch.float32, channels_last=True),
        decoded_side=32,
    )


def _batches(data: DataPipeline) -> list[Batch]:
    """Return all batches of an epoch, including the short last step, and of an evaluation."""
    return [batch for step in data.train_epoch(1) for batch in step] + list(data.evaluation("test"))


def _contents(batch: Batch) -> dict[str, Tensor]:
    found = {
        "images": batch.images, "labels": batch.labels, "sample_ids": batch.sample_ids, "sample_keys": batch.sample_keys
    }  # fmt: skip
    return found | ({"mixed labels": batch.mixed.labels, "own weight": batch.mixed.own_weight} if batch.mixed else {})


def _placements(checks: Checks) -> None:
    on_device = _batches(_pipeline(checks, checks.device, "device"))
    with checks.check("images in host memory give the same batches"):
        for index, (one, other) in enumerate(
            zip(on_device, _batches(_pipeline(checks, checks.device, "host")), strict=True)
        ):
            different = differing(_contents(one), _contents(other))
            assert not different, f"batch {index}: {different}"
    with checks.check("batches equal the CPU's") as figures:
        figures["images"] = figures["own weight"] = 0.0
        for one, other in zip(on_device, _batches(_pipeline(checks, _CPU, "device")), strict=True):
            found, expected = _contents(one), _contents(other)
            for name in expected:
                if name in figures:
                    figures[name] = max(figures[name], error(found[name], expected[name]))
                else:
                    assert same_bits(found[name], expected[name]), name
        assert max(figures.values()) < 1e-6, figures


def _outcomes(count: int, *, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [n] of widely varying size, logits [n, 10] and labels [n], on the CPU."""
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, 10, generator=generator)
    if ties:
        logits = logits.round()
    labels = torch.randint(0, 10, (count,), generator=generator)
    losses = torch.randn(count, generator=generator).exp() * 10.0 ** torch.randint(-6, 5, (count,), generator=generator)
    return losses, logits, labels


def _read(device: torch.device, *batches: tuple[Tensor, Tensor, Tensor]) -> Totals:
    totals = TotalsAccumulator(device)
    for step, batch in enumerate(batches):
        losses, logits, labels = (tensor.to(device) for tensor in batch)
        totals.add(losses, logits, labels, step=step)
        totals.add_step(losses.sum())
    return totals.read()


def _totals(checks: Checks) -> None:
    plain = [_outcomes(count, ties=False) for count in (128, 1, 0, 77)]
    with checks.check("totals equal the CPU's"):
        assert _read(checks.device, *plain) == _read(_CPU, *plain)
    for value in (float("nan"), float("inf"), -float("inf"), 2.0**60):
        with checks.check(f"totals with a loss of {value} equal the CPU's"):
            losses, logits, labels = _outcomes(50, ties=False)
            losses[17] = value
            found, expected = (
                _read(device, *plain, (losses, logits, labels), *plain) for device in (checks.device, _CPU)
            )
            assert found == expected, (found, expected)
            assert found.first_bad_step == 4
    with checks.check("ties: the first of the largest logits is the prediction") as figures:
        losses, logits, labels = _outcomes(1000, ties=True)
        found = _read(checks.device, (losses, logits, labels))
        best = logits.double() - torch.arange(10) * 1e-6  # makes the first of equal logits the largest
        assert found.correct == int((best.argmax(1) == labels).sum())
        # Which of equal logits are in the top five is unspecified: within these bounds, and always the same.
        right = logits.gather(1, labels[:, None])
        least = int(((logits >= right).sum(1) <= 5).sum())
        most = int(((logits > right).sum(1) < 5).sum())
        figures |= {"top 5": found.correct5, "least": least, "most": most}
        figures["on the CPU"] = _read(_CPU, (losses, logits, labels)).correct5
        assert least <= found.correct5 <= most
        assert found == _read(checks.device, (losses, logits, labels))
