"""Which layers of a network are replaced by keyed ones, and how the replaced network computes."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from distributed import rng
from distributed.errors import InputError
from distributed.models.convert_dropout import convert_dropout
from distributed.models.keyed_dropout import KeyedDropout, use_sample_keys

SHAPES = {  # of a batch, and of a sample's units
    nn.Dropout: ((400, 3, 5), (3, 5)),
    nn.AlphaDropout: ((400, 3, 5), (3, 5)),
    nn.Dropout1d: ((400, 6, 5), (6, 1)),
    nn.Dropout2d: ((400, 6, 5, 4), (6, 1, 1)),
    nn.Dropout3d: ((400, 6, 5, 2, 2), (6, 1, 1, 1)),
    nn.FeatureAlphaDropout: ((400, 6, 5, 2), (6, 1, 1)),
}


def keys_of(count: int) -> Tensor:
    return rng.sample_keys(torch.arange(count), seed=0, epoch=0)


def applied(layer: nn.Module, x: Tensor) -> Tensor:
    with use_sample_keys(keys_of(len(x))):
        return layer(x)


def check_units(found: Tensor, torchs: Tensor, units: tuple[int, ...], p: float) -> None:
    """Check that both have the same values, that units are constant, and that a fraction p of them is dropped."""
    assert torch.allclose(found.unique(), torchs.unique(), rtol=1e-12)
    first = found[tuple(slice(None) if i == 0 or units[i - 1] > 1 else slice(1) for i in range(found.dim()))]
    assert first.shape == (len(found), *units)
    assert torch.equal(first.expand_as(found), found)
    dropped = (first == found.min()).double().mean()
    assert abs(float(dropped) - p) < 4 * (p * (1 - p) / first.numel()) ** 0.5


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
def test_torchs_layers_keep_their_definition(kind: type[nn.Module]) -> None:
    shape, units = SHAPES[kind]
    x = torch.ones(shape, dtype=torch.float64)
    layer = kind(0.25)
    torchs = layer(x)
    keyed = convert_dropout(nn.Sequential(layer))
    assert type(keyed[0]) is not kind
    check_units(applied(keyed, x), torchs, units, 0.25)


def test_stochastic_depth_keeps_its_definition() -> None:
    x, layer = torch.ones(2000, 4, 3, dtype=torch.float64), StochasticDepth(0.25, "row")
    check_units(applied(convert_dropout(nn.Sequential(layer)), x), layer(x), (1, 1), 0.25)


def test_stochastic_depth_of_the_batch_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), StochasticDepth(0.1, "batch"), StochasticDepth(0.0, "batch"))
    with pytest.raises(InputError, match=r"^1: StochasticDepth with mode = 'batch' .* use mode = 'row'$"):
        convert_dropout(model)


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
@pytest.mark.parametrize("scale", [False, True])
def test_drop_path_keeps_its_definition(scale: bool) -> None:
    from timm.layers import DropPath

    x, layer = torch.ones(2000, 4, 3, dtype=torch.float64), DropPath(0.25, scale_by_keep=scale)
    check_units(applied(convert_dropout(nn.Sequential(layer)), x), layer(x), (1, 1), 0.25)


def drop_path_like() -> nn.Module:
    """Return a layer that has the name and attributes of timm's."""

    class DropPath(nn.Module):
        drop_prob, scale_by_keep = 0.5, False

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not replaced")

    DropPath.__module__, DropPath.__qualname__ = "timm.layers.drop", "DropPath"
    return DropPath()


def test_drop_path_is_recognized_by_name() -> None:
    model = convert_dropout(nn.Sequential(drop_path_like()))
    assert set(applied(model, torch.ones(50, 2)).unique().tolist()) == {0.0, 1.0}


class OwnForward(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class SameForward(nn.Dropout):
    pass


class Branches(nn.Module):
    """Has a layer at two paths, a shared block, and a subclass with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.second = self.first
        self.alias = self.first[1]
        self.own, self.same = OwnForward(0.5), SameForward(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.second(self.first(x)))


def test_shared_layers_and_subclasses() -> None:
    model = Branches()
    weight = model.first[0].weight
    assert convert_dropout(model) is model
    assert model.first is model.second
    assert model.alias is model.first[1]
    assert (model.alias.name, type(model.same), type(model.own)) == ("first.1", KeyedDropout, OwnForward)
    assert model.first[0].weight is weight
    assert "name=first.1" in repr(model)
    assert applied(model, torch.ones(9, 4)).shape == (9, 4)


def test_layers_with_hooks_or_a_replaced_forward_are_kept() -> None:
    hooked, patched, plain = nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0.5)
    hooked.register_forward_hook(lambda layer, inputs, output: output + 1)
    patched.forward = lambda x: x + 1
    model = convert_dropout(nn.Sequential(hooked, patched, plain))
    assert [type(layer) for layer in model] == [nn.Dropout, nn.Dropout, KeyedDropout]


def test_layers_keep_their_mode_and_place() -> None:
    model = nn.Sequential(nn.Dropout(0.5, inplace=True).eval(), nn.Dropout2d(0.25))
    converted = convert_dropout(model)
    assert [layer.training for layer in converted] == [False, True]
    assert [layer.inplace for layer in converted] == [True, False]
    assert [layer.p for layer in converted] == [0.5, 0.25]
    assert list(dict(converted.named_modules())) == ["", "0", "1"]


def test_a_model_that_is_one_dropout_layer() -> None:
    assert isinstance(convert_dropout(nn.Dropout(0.5)), KeyedDropout)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Dropout1d(0.5), (3, 4)), (nn.Dropout2d(0.5), (3,)), (nn.Dropout3d(0.5), (3, 4, 5, 6))]
)
def test_unbatched_inputs_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"0 \({type(layer).__name__}\): an input of shape .*no batch dimension"):
        applied(convert_dropout(nn.Sequential(layer)), torch.ones(shape))
