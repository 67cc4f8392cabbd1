from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import rng
from distributed.config.data import Augment
from distributed.data.mixup import beta, mix


def keys_of(count: int, seed: int = 0) -> Tensor:
    return rng.sample_keys(torch.arange(count), seed=seed, epoch=0)


def pair(count: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, 32, 32, 3), torch.randn(count, 32, 32, 3)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_draws_follow_the_beta_distribution(alpha):
    found = beta(keys_of(40_000), "mixup", alpha).sort().values
    expected = torch.distributions.Beta(alpha, alpha)
    torch.manual_seed(0)
    drawn = expected.sample((40_000,)).double().sort().values
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(found.var()) == pytest.approx(float(expected.variance), rel=0.03)
    assert float((found - drawn).abs().max()) < 0.03, "quantile by quantile"


def test_mixup_blends_images_by_the_labels_weight():
    images, others = pair()
    mixed, own_weight = mix(images, others, keys_of(64), Augment(mixup=1.0))
    weight = own_weight[:, None, None, None]
    assert torch.allclose(mixed, weight * images + (1 - weight) * others, atol=1e-5)
    assert 0 < float(own_weight.min()) < 0.2
    assert 0.8 < float(own_weight.max()) < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)])
def test_mixing_on_cuda_equals_the_cpu(config):
    images, others = pair()
    mixed, own_weight = mix(images.cuda(), others.cuda(), keys_of(64).cuda(), config)
    expected, expected_weight = mix(images, others, keys_of(64), config)
    assert torch.allclose(mixed.cpu(), expected, atol=1e-5)
    assert torch.allclose(own_weight.cpu(), expected_weight, atol=1e-6)


def test_cutmix_pastes_one_box_and_weights_the_label():
    images, others = pair(256)
    mixed, own_weight = mix(images, others, keys_of(256), Augment(cutmix=1.0))
    pasted = (mixed == others).all(3)
    assert torch.equal(mixed, torch.where(pasted[..., None], others, images))
    assert torch.allclose(own_weight, 1 - pasted.float().mean((1, 2)))
    for box in pasted:
        rows, columns = box.any(1), box.any(0)
        assert int(box.sum()) == int(rows.sum()) * int(columns.sum()), "a rectangle"
    assert 0.3 < float(own_weight.mean()) < 0.8
    assert float(own_weight.min()) < 0.2


def test_with_both_each_image_gets_one_of_them():
    images, others = pair(400)
    keys = keys_of(400)
    mixed, own_weight = mix(images, others, keys, Augment(mixup=0.5, cutmix=1.0))
    blended = mix(images, others, keys, Augment(mixup=0.5))
    pasted = mix(images, others, keys, Augment(cutmix=1.0))
    by_box = [torch.equal(mixed[i], pasted[0][i]) and bool(own_weight[i] == pasted[1][i]) for i in range(400)]
    by_blend = [torch.equal(mixed[i], blended[0][i]) and bool(own_weight[i] == blended[1][i]) for i in range(400)]
    assert all(a or b for a, b in zip(by_box, by_blend, strict=True))
    assert 150 < sum(by_box) < 250


def test_mixing_does_not_depend_on_the_rest_of_the_batch():
    images, others = pair()
    config = Augment(mixup=0.3, cutmix=0.7)
    full, own_weight = mix(images, others, keys_of(64), config)
    few, few_weight = mix(images[5:8], others[5:8], keys_of(64)[5:8], config)
    assert torch.equal(few, full[5:8])
    assert torch.equal(few_weight, own_weight[5:8])
    again, _ = mix(images, others, keys_of(64, seed=1), config)
    assert not torch.equal(again, full)


def test_an_empty_batch_can_be_mixed():
    images, own_weight = mix(
        torch.empty(0, 32, 32, 3), torch.empty(0, 32, 32, 3), keys_of(0), Augment(mixup=1, cutmix=1)
    )
    assert (images.shape, own_weight.shape) == ((0, 32, 32, 3), (0,))


def one_try_after_the_other(keys: Tensor, purpose: str, alpha: float) -> Tensor:
    """`beta`, which draws all tries at once, gives the same bits as this sequential definition."""
    count = len(keys)
    keys = torch.cat([keys, keys_of(-count % 64)])  # in full vectors: pow rounds the tail of a row differently
    found = torch.full((len(keys),), 0.5, dtype=torch.float64)
    waiting = torch.ones(len(keys), dtype=torch.bool)
    for attempt in range(16):
        x = rng.unit(keys, f"{purpose}_{attempt}_x") ** (1 / alpha)
        y = rng.unit(keys, f"{purpose}_{attempt}_y") ** (1 / alpha)
        accepted = waiting & (x + y <= 1) & (x + y > 0)
        found = torch.where(accepted, x / (x + y), found)
        waiting = waiting & ~accepted
    return found[:count]


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.7, 1.0])
def test_a_draw_does_not_depend_on_the_other_samples(alpha: float) -> None:
    keys = keys_of(1009)
    together = beta(keys, "mixup", alpha)
    for pieces in (2, 3, 5, 7, 200):
        assert torch.equal(torch.cat([beta(piece, "mixup", alpha) for piece in keys.tensor_split(pieces)]), together)


@pytest.mark.parametrize("count", [0, 1, 13, 100, 128, 20_000])
@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.5, 0.7, 1.0])
def test_draws_are_the_first_accepted_try(count: int, alpha: float) -> None:
    keys = keys_of(count, seed=count)
    for purpose in ("mixup", "cutmix"):
        assert torch.equal(beta(keys, purpose, alpha), one_try_after_the_other(keys, purpose, alpha))


def test_a_sample_without_an_accepted_try_gets_one_half() -> None:
    keys = keys_of(100_000, seed=4)
    found = beta(keys, "mixup", 1.0)
    assert (found == 0.5).nonzero().flatten().tolist() == [19308, 51274, 69952]
    assert torch.equal(found, one_try_after_the_other(keys, "mixup", 1.0))


class Operations(TorchDispatchMode):
    """Counts the dispatched operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_all_tries_are_drawn_in_a_few_operations() -> None:
    keys = keys_of(8)
    with Operations() as operations:
        beta(keys, "mixup", 0.4)
    assert 10 < operations.count < 50
