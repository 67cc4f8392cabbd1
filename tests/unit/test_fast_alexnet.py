"""The fast AlexNet and its whitened first layer."""

from pathlib import Path

import pytest
import torch
from kit.arrays import write_arrays
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distributed import load_config
from distributed.build import build_data
from distributed.config.models import FastAlexNet as Config
from distributed.models.build import build_model
from distributed.models.fast_alexnet import FastAlexNet, whitening
from distributed.models.resize import resize
from distributed.network import whiten_first_layer
from distributed.topology import Topology


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


def test_all_sizes_but_that_of_low_resolution_are_resized() -> None:
    model = built(widths=(8, 8, 8))
    for size in ((48, 40), (28, 28), (28, 20), (9, 9)):
        assert model.resized(torch.zeros(2, 3, *size)).shape[2:] == (32, 32)
        assert model(torch.zeros(2, 3, *size)).shape == (2, 10)
    model.low_res_side = 20
    assert model.resized(images := torch.zeros(2, 3, 20, 20)) is images
    assert model(images).shape == (2, 10)
    assert model.resized(torch.zeros(2, 3, 24, 24)).shape[2:] == (32, 32)


def test_whitening_sees_images_in_the_networks_size(tmp_path: Path) -> None:
    """Patches of an image of 96 x 96 pixels are smoother than those of the image that the network resizes to 32 x 32."""
    model = {"name": "fast_alexnet", "widths": [8, 8, 8]}
    root = write_arrays(tmp_path / "arrays", (96, 96, 3))
    config = load_config(model=model, data={"name": "arrays", "root": root})
    data = build_data(config, Topology(), torch.device("cpu"))
    network = build_model(config.model, num_classes=3, seed=0)
    whiten_first_layer(network, data)
    assert torch.equal(network.first.weight.double(), whitening(resize(data.inputs(1000), 32)).float().double())
