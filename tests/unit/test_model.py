import pytest
import torch
from torch import nn

from distributed import keyed
from distributed.config.sections import Model
from distributed.models.alexnet import improved_alexnet
from distributed.models.build import build_model, initialize


def model_of(seed: int = 0, classes: int = 10) -> nn.Module:
    return build_model(Model(), num_classes=classes, seed=seed)


@pytest.mark.parametrize(("classes", "parameters"), [(10, 907_210), (100, 918_820)])
def test_the_number_of_parameters_is_the_seeds(classes, parameters):
    assert sum(p.numel() for p in model_of(classes=classes).parameters()) == parameters


@pytest.mark.parametrize("classes", [10, 100])
def test_images_become_logits(classes):
    model = model_of(classes=classes)
    keys = keyed.sample_keys(torch.arange(3), seed=0, epoch=0)
    assert model(torch.randn(3, 3, 32, 32), keys).shape == (3, classes)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, classes)


def test_evaluation_of_no_images_gives_no_logits():
    assert model_of().eval()(torch.empty(0, 3, 32, 32)).shape == (0, 10)


def test_the_probability_of_dropout_is_the_configs():
    model = build_model(Model(dropout=0.25), num_classes=10, seed=0)
    assert [m.threshold for m in model.modules() if hasattr(m, "threshold")] == [16384, 16384]


def test_the_two_dropout_layers_draw_apart():
    model = improved_alexnet(10, 0.5)
    keys = keyed.sample_keys(torch.arange(20), seed=0, epoch=0)
    assert not torch.equal(model.dropout1.kept(keys)[:, :128], model.dropout2.kept(keys))


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = model_of(seed=3).state_dict()
    torch.manual_seed(2)
    again, other = model_of(seed=3).state_dict(), model_of(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_a_layer_keeps_its_weights_beside_any_others():
    small, large = nn.ModuleDict({"a": nn.Linear(4, 3)}), nn.ModuleDict({"z": nn.Linear(9, 9), "a": nn.Linear(4, 3)})
    initialize(small, seed=1)
    initialize(large, seed=1)
    assert torch.equal(small["a"].weight, large["a"].weight)
    assert torch.equal(small["a"].bias, large["a"].bias)


def test_layers_of_one_shape_start_with_different_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    initialize(model, seed=1)
    assert not torch.equal(model[0].weight, model[1].weight)


@torch.no_grad()
def test_initial_weights_fill_torchs_bounds():
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
