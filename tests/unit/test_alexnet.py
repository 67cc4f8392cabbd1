"""The AlexNet variants and their initial weights."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import resize as torchvision_resize

from distributed import rng
from distributed.config.models import Model
from distributed.models import alexnet
from distributed.models.build import build_model, initialize
from distributed.models.keyed_dropout import KeyedDropout, use_sample_keys
from distributed.models.local_response_norm import LocalResponseNorm
from distributed.models.resize import resize

MODELS = {  # parameters for 10 and 100 classes, and MFLOP of one image's forward pass, from the references' table
    "alexnet": (58_322_314, 58_691_044, 2262),
    "improved_alexnet": (907_210, 918_820, 50),
    "cifar_alexnet": (24_740_234, 25_108_964, 484),
}


def model_of(name: str = "improved_alexnet", seed: int = 0, classes: int = 10) -> nn.Module:
    return build_model(Model(name=name), num_classes=classes, seed=seed)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_match_the_references(name):
    with torch.device("meta"):
        models = [getattr(alexnet, name)(classes, 0.5) for classes in (10, 100)]
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == MODELS[name][:2]
    model = model_of(name).eval()
    for index, layer in enumerate(model.conv):
        if isinstance(layer, LocalResponseNorm):
            model.conv[index] = nn.Identity()  # the table counts convolutions and linear layers
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert counter.get_total_flops() / 1e6 == pytest.approx(MODELS[name][2], rel=0.01)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", [*MODELS, "cifar_alexnet_bn"])
def test_shape_of_logits(name, classes):
    model = model_of(name, classes=classes)
    keys = rng.sample_keys(torch.arange(3), seed=0, epoch=0)
    with use_sample_keys(keys):
        assert model(torch.randn(3, 3, 32, 32)).shape == (3, classes)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, classes)
    assert model(torch.empty(0, 3, 32, 32)).shape == (0, classes)


def test_batch_norm_replaces_local_response_norm():
    assert [type(layer).__name__ for layer in model_of("cifar_alexnet").conv].count("LocalResponseNorm") == 3
    layers = [type(layer).__name__ for layer in model_of("cifar_alexnet_bn").conv]
    assert layers.count("BatchNorm2d") == 5
    assert "LocalResponseNorm" not in layers


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("side", [32, 300])
def test_resize_matches_torchvision(memory_format, side):
    images = torch.rand(2, 3, side, side).contiguous(memory_format=memory_format)
    expected = torchvision_resize(images, [224, 224], antialias=True)
    found = resize(images, 224)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=memory_format)
    same = torch.rand(2, 3, 224, 224)
    assert resize(same, 224) is same


def test_empty_batch_gives_empty_logits():
    assert model_of().eval()(torch.empty(0, 3, 32, 32)).shape == (0, 10)


def test_dropout_probability_comes_from_the_config():
    model = build_model(Model(dropout=0.25), num_classes=10, seed=0)
    assert [m.p for m in model.modules() if isinstance(m, KeyedDropout)] == [0.25, 0.25]


def test_the_two_dropout_layers_have_different_masks():
    model = model_of()
    keys = rng.sample_keys(torch.arange(20), seed=0, epoch=0)
    assert not torch.equal(model.dropout1.kept(keys, 128), model.dropout2.kept(keys, 128))


def test_initial_weights_depend_on_the_seed_only():
    torch.manual_seed(1)
    first = model_of(seed=3).state_dict()
    torch.manual_seed(2)
    again, other = model_of(seed=3).state_dict(), model_of(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_initial_weights_do_not_depend_on_other_layers():
    small, large = nn.ModuleDict({"a": nn.Linear(4, 3)}), nn.ModuleDict({"z": nn.Linear(9, 9), "a": nn.Linear(4, 3)})
    initialize(small, seed=1)
    initialize(large, seed=1)
    assert torch.equal(small["a"].weight, large["a"].weight)
    assert torch.equal(small["a"].bias, large["a"].bias)


def test_layers_of_equal_shape_start_differently():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    initialize(model, seed=1)
    assert not torch.equal(model[0].weight, model[1].weight)


@torch.no_grad()
def test_initial_weights_match_torchs_distribution():
    for module in model_of().modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = torch.tensor(module.weight[0].numel() ** -0.5)
            assert module.weight.abs().max() <= bound
            assert module.bias.abs().max() <= bound
            assert module.weight.abs().max() > 0.95 * bound
            assert float(module.weight.std()) == pytest.approx(float(bound) / 3**0.5, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


@torch.no_grad()
def test_he_initialization_preserves_activation_variance():
    images = torch.rand(8, 3, 32, 32)
    deviations = []
    for init in ("torch", "he"):
        model = build_model(Model(name="cifar_alexnet", init=init), num_classes=10, seed=0).eval()
        deviations.append(float(model(images).std()))
        assert all(not module.bias.any() for module in model.modules() if isinstance(module, nn.Linear)) == (
            init == "he"
        )
    bound = (6 / (3 * 25)) ** 0.5
    assert 0.99 * bound < float(model.conv[0].weight.abs().max()) <= bound
    assert deviations[1] > 0.2 > 0.05 > deviations[0]
