"""Dropout computed from sample keys."""

import pytest
import torch

from distributed import rng
from distributed.models.keyed_dropout import KeyedDropout


def keys_of(count: int) -> torch.Tensor:
    return rng.sample_keys(torch.arange(count), seed=0, epoch=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_a_fraction_p_and_keeps_the_mean(p: float) -> None:
    layer = KeyedDropout(p, features=200, name="a")
    out = layer(torch.ones(1000, 200), keys_of(1000))
    dropped = float((out == 0).double().mean())
    deviation = (p * (1 - p) / 200_000) ** 0.5
    assert abs(dropped - p) < 4 * deviation
    assert abs(float(out.double().mean()) - 1) < 4 * deviation / (1 - p)


def test_kept_units_are_scaled_up() -> None:
    out = KeyedDropout(0.75, features=50, name="a")(torch.ones(20, 50), keys_of(20))
    assert set(out.unique().tolist()) == {0.0, 4.0}


def test_evaluation_is_the_identity_and_needs_no_keys() -> None:
    layer = KeyedDropout(0.5, features=5, name="a").eval()
    x = torch.randn(3, 5)
    assert torch.equal(layer(x, None), x)


def test_probability_zero_is_the_identity() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(KeyedDropout(0.0, features=5, name="a")(x, None), x)


def test_training_without_keys_is_an_error() -> None:
    with pytest.raises(ValueError, match="KeyedDropout: training needs sample_keys"):
        KeyedDropout(0.5, features=5, name="a")(torch.ones(3, 5), None)


def test_gradient_flows_through_kept_units_only() -> None:
    layer = KeyedDropout(0.5, features=30, name="a")
    x = torch.randn(10, 30, requires_grad=True)
    layer(x, keys_of(10)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, layer.kept(keys_of(10)) * 2.0)


def test_a_sample_has_the_same_mask_in_any_batch() -> None:
    layer = KeyedDropout(0.5, features=30, name="a")
    assert torch.equal(layer.kept(keys_of(10))[3:5], layer.kept(keys_of(10)[3:5]))


def test_mask_of_an_odd_number_of_units() -> None:
    assert KeyedDropout(0.5, features=7, name="a").kept(keys_of(10)).shape == (10, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert KeyedDropout(0.5, features=4, name="a")(torch.ones(2, 4, dtype=dtype), keys_of(2)).dtype == dtype


def test_adds_nothing_to_the_state_dict() -> None:
    assert KeyedDropout(0.5, features=4, name="a").state_dict() == {}


def test_probability_close_to_one_stays_finite() -> None:
    out = KeyedDropout(0.9999999, features=400, name="a")(torch.ones(500, 400), keys_of(500))
    assert out.isfinite().all()
