"""`ModelState`: evaluation with EMA weights, partial loads, and float16 steps that are skipped on overflow."""

import pytest
import torch
from torch import Tensor, nn

from distributed.config.optim import AdamW, Sgd
from distributed.engine.model_state import ModelState
from distributed.optim.loss_scale import INITIAL_SCALE

OPTIMIZERS = {
    "momentum": Sgd(ema_decay=0.9),
    "momentum, clipped": Sgd(max_grad_norm=0.5),
    "no momentum": Sgd(momentum=0.0, nesterov=False),
    "AdamW": AdamW(ema_decay=0.9, max_grad_norm=0.7),
}


def model_state(optim: Sgd | AdamW, precision: str = "float32") -> ModelState:
    torch.manual_seed(0)
    return ModelState(optim, nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), precision=precision)


def take_step(state: ModelState, step: int, *, scale: float = 1.0, bad: float | None = None) -> Tensor:
    """Take one step with random gradients times `scale`, one element replaced by `bad`; return the gradient norm."""
    generator = torch.Generator().manual_seed(step)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    if bad is not None:
        next(state.model.parameters()).grad[0, 0] = bad
    norm = state.step(0.1, step=step)
    state.zero_grad()
    return norm


def test_evaluates_with_ema_then_restores_weights() -> None:
    state = model_state(Sgd(ema_decay=0.9))
    linear = state.model[0]
    before = linear.weight.detach().clone()
    state.ema.tensors["0.weight"].fill_(7.0)
    with state.evaluating():
        assert not state.model.training
        assert bool((linear.weight == 7).all())
    assert state.model.training
    assert torch.equal(linear.weight, before)


def test_evaluation_that_raises_restores_training_mode() -> None:
    state = model_state(Sgd(ema_decay=0.9))
    before = state.model[0].weight.detach().clone()
    state.ema.tensors["0.weight"].fill_(7.0)
    with pytest.raises(KeyError), state.evaluating():
        raise KeyError
    assert state.model.training
    assert torch.equal(state.model[0].weight, before)


def test_missing_ema_starts_at_weights_and_optimizer_at_zero() -> None:
    state = model_state(AdamW(ema_decay=0.9))
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.step(0.1, step=0)
    saved = {name: tensor.clone() for name, tensor in state.state()}
    assert float(saved["optimizer.0.weight.step"]) == 1
    state.load({name: tensor for name, tensor in saved.items() if name.startswith("model.")})
    loaded = dict(state.state())
    assert torch.equal(loaded["ema.0.weight"], saved["model.0.weight"])
    assert not torch.equal(saved["ema.0.weight"], saved["model.0.weight"])
    assert all(not tensor.any() for name, tensor in loaded.items() if name.startswith("optimizer."))
    state.load(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.state())


def test_no_ema_tensors_without_ema_decay() -> None:
    assert not any(name.startswith("ema.") for name, _ in model_state(Sgd()).state())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_scaling_changes_no_bit_of_the_update(name: str) -> None:
    plain, scaled = (model_state(OPTIMIZERS[name], precision) for precision in ("float32", "float16"))
    for step in range(4):
        assert torch.equal(take_step(scaled, step, scale=INITIAL_SCALE), take_step(plain, step))
    found = dict(scaled.state())
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.state())
    assert found.keys() - dict(plain.state()).keys() == {"scaler.scale", "scaler.good_steps"}


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_changes_nothing_but_the_scale(name: str, bad: float) -> None:
    state, undisturbed = (model_state(OPTIMIZERS[name], "float16") for _ in range(2))
    for step in range(3):
        for each in (state, undisturbed):
            take_step(each, step, scale=INITIAL_SCALE)
    norm = take_step(state, 3, scale=INITIAL_SCALE, bad=bad)
    assert float(norm) == float("inf"), "whichever non-finite value the gradient contains"
    found = dict(state.state())
    assert float(found.pop("scaler.scale")) == INITIAL_SCALE / 2
    assert int(found.pop("scaler.good_steps")) == 0
    assert [key for key, tensor in undisturbed.state() if key in found and not torch.equal(found[key], tensor)] == []
    take_step(state, 4, scale=INITIAL_SCALE / 2)
    take_step(undisturbed, 4, scale=INITIAL_SCALE)
    found = dict(state.state())
    expected = {key: tensor for key, tensor in undisturbed.state() if not key.startswith("scaler.")}
    assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []


def test_another_precisions_loss_scale_is_not_loaded() -> None:
    float16, float32 = (model_state(Sgd(), precision) for precision in ("float16", "float32"))
    take_step(float16, 0, scale=INITIAL_SCALE, bad=float("inf"))
    float32.load(dict(float16.state()))
    assert not any(key.startswith("scaler.") for key, _ in float32.state())
    float16.load(dict(float32.state()))
    assert float(dict(float16.state())["scaler.scale"]) == INITIAL_SCALE
