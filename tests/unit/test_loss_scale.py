"""float16's loss scale: when it changes, and that a skipped step is none."""

import pytest
import torch
from torch import Tensor, nn

from distributed.config.sections import AdamW, Sgd
from distributed.engine.model_state import ModelState
from distributed.optim import loss_scale
from distributed.optim.loss_scale import GOOD_STEPS, START, LossScale

CPU = torch.device("cpu")
GOOD, BAD = torch.zeros(()), torch.ones(())


def test_it_is_halved_at_an_overflow_and_doubled_after_many_good_steps():
    scale = LossScale(CPU)
    assert float(scale.scale) == 2.0**16
    for _ in range(GOOD_STEPS - 1):
        scale.update(GOOD)
    assert float(scale.scale) == START
    scale.update(BAD)
    assert float(scale.scale) == START / 2
    for _ in range(GOOD_STEPS - 1):
        scale.update(GOOD)
    assert float(scale.scale) == START / 2, "an overflow begins the count anew"
    scale.update(GOOD)
    assert float(scale.scale) == START
    for _ in range(GOOD_STEPS):
        scale.update(GOOD)
    assert float(scale.scale) == 2 * START, "as does a doubling"


def test_it_leaves_neither_end_of_what_can_be_undone(monkeypatch):
    scale = LossScale(CPU)
    for _ in range(300):
        scale.update(BAD)
    assert float(scale.scale) == loss_scale.LEAST
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 1)
    for _ in range(300):
        scale.update(GOOD)
    assert float(scale.scale) == loss_scale.MOST


def test_a_state_goes_on_where_it_was_and_none_is_as_at_the_start():
    used, other = LossScale(CPU), LossScale(CPU)
    for overflow in (BAD, GOOD, GOOD):
        used.update(overflow)
    saved = {name: tensor.clone() for name, tensor in used.state()}
    assert {name: tensor.item() for name, tensor in saved.items()} == {
        "scaler.scale": START / 2,
        "scaler.good_steps": 2,
    }
    other.load(saved)
    assert dict(other.state()) == dict(used.state())
    other.load({})
    assert {name: tensor.item() for name, tensor in other.state()} == {"scaler.scale": START, "scaler.good_steps": 0}


OPTIMIZERS = {
    "momentum": Sgd(ema_decay=0.9),
    "momentum, clipped": Sgd(max_grad_norm=0.5),
    "no momentum": Sgd(momentum=0.0, nesterov=False),
    "AdamW": AdamW(ema_decay=0.9, max_grad_norm=0.7),
}


def weights_of(optim: Sgd | AdamW, precision: str) -> ModelState:
    torch.manual_seed(0)
    return ModelState(optim, nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), precision=precision)


def stepped(weights: ModelState, step: int, *, scale: float = 1.0, bad: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    for parameter in weights.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    if bad is not None:
        next(weights.model.parameters()).grad[0, 0] = bad
    norm = weights.update(0.1, step=step)
    weights.zero_grad()
    return norm


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_unscaled_gradients_to_the_bit(name):
    plain, scaled = (weights_of(OPTIMIZERS[name], precision) for precision in ("float32", "float16"))
    for step in range(4):
        assert torch.equal(stepped(scaled, step, scale=START), stepped(plain, step))
    found = dict(scaled.state())
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.state())
    assert found.keys() - dict(plain.state()).keys() == {"scaler.scale", "scaler.good_steps"}


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_an_overflow_changes_nothing_but_the_scale(name, bad):
    weights, undisturbed = (weights_of(OPTIMIZERS[name], "float16") for _ in range(2))
    for step in range(3):
        for used in (weights, undisturbed):
            stepped(used, step, scale=START)
    norm = stepped(weights, 3, scale=START, bad=bad)
    assert float(norm) == float("inf"), "one number, whatever the gradient was"
    found = dict(weights.state())
    assert float(found.pop("scaler.scale")) == START / 2
    assert int(found.pop("scaler.good_steps")) == 0
    assert [key for key, tensor in undisturbed.state() if key in found and not torch.equal(found[key], tensor)] == []
    stepped(weights, 4, scale=START / 2)
    stepped(undisturbed, 4, scale=START)
    found = dict(weights.state())
    assert [
        key
        for key, tensor in undisturbed.state()
        if not key.startswith("scaler.") and not torch.equal(found[key], tensor)
    ] == []


def test_a_state_of_another_precision_is_loaded_without_its_scale():
    low, wide = (weights_of(Sgd(), precision) for precision in ("float16", "float32"))
    stepped(low, 0, scale=START, bad=float("inf"))
    wide.load(dict(low.state()))
    assert not any(key.startswith("scaler.") for key, _ in wide.state())
    low.load(dict(wide.state()))
    assert float(dict(low.state())["scaler.scale"]) == START
