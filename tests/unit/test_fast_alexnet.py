"""The fast AlexNet and its whitened first layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distributed.config.models import FastAlexNet as Config
from distributed.models.build import build_model
from distributed.models.fast_alexnet import FastAlexNet, whitening


def built(**settings: object) -> FastAlexNet:
    model = build_model(Config(**settings), num_classes=10, seed=0)
    assert isinstance(model, FastAlexNet)
    return model


def smooth_images(count: int = 64) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are correlated."""
    coarse = torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (32, 32), mode="bilinear") + 0.5 * F.interpolate(coarse[:, :1], (32, 32))


def test_it_has_the_size_that_the_docs_name() -> None:
    model = built()
    assert sum(p.numel() for p in model.parameters()) == 1_972_802
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 1e6) == 236


def test_whitened_patches_are_uncorrelated_with_unit_variance() -> None:
    images = smooth_images()
    outputs = F.conv2d(images.double(), whitening(images)).permute(1, 0, 2, 3).flatten(1)
    assert torch.equal(outputs[:12], -outputs[12:])
    covariance = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    variances = covariance.diagonal()
    assert torch.allclose(covariance, variances.diag(), atol=1e-9)
    # Directions that hardly occur are damped: the patches of such smooth images have some.
    assert 0.99 < variances.max() <= 1
    assert (variances > 0.9).sum() >= 4


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_whitening_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    before, expected = torch.get_num_threads(), whitening(smooth_images())
    torch.set_num_threads(threads)
    try:
        assert torch.equal(whitening(smooth_images()), expected)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_whitened", [True, False])
def test_whitened_weights_are_not_trained(is_whitened: bool) -> None:
    model = built(whitening=is_whitened)
    assert model.first.weight.requires_grad == (not is_whitened)
    assert model.first.bias is not None
    assert model.first.bias.requires_grad


def test_it_starts_with_equal_logits_and_copies_of_its_inputs() -> None:
    model = built()
    assert not model(smooth_images(4)).any()
    x = torch.rand(2, 24, 8, 8)
    assert torch.equal(model.blocks[0][0](x)[:, :24], x)


def test_initial_weights_depend_on_the_seed() -> None:
    first, second = (build_model(Config(), num_classes=10, seed=seed).state_dict() for seed in (0, 1))
    assert {name for name in first if not torch.equal(first[name], second[name])} == {
        "first.weight", "blocks.0.0.weight", "blocks.1.0.weight",
    }  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), [({}, nn.ReLU), ({"activation": "gelu"}, nn.GELU)])
def test_every_layer_has_the_chosen_activation(settings: dict[str, str], expected: type[nn.Module]) -> None:
    model = built(widths=(8, 8, 8), **settings)
    found = [type(module) for module in model.modules() if isinstance(module, nn.ReLU | nn.GELU)]
    assert found == [expected] * 7
    assert (model.activation(torch.tensor(-0.5)) < 0) == (expected is nn.GELU)


def test_other_sizes_are_resized() -> None:
    assert built(widths=(8, 8, 8))(torch.zeros(2, 3, 48, 40)).shape == (2, 10)
