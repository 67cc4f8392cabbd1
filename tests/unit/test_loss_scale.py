"""When float16's loss scale grows and shrinks, and its state. Skipped steps are tested in test_model_state.py."""

import pytest
import torch

from distributed.optim import loss_scale
from distributed.optim.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale

CPU = torch.device("cpu")
GOOD, BAD = torch.zeros(()), torch.ones(())


def test_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(CPU)
    assert float(scale.scale) == 2.0**16
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(GOOD)
    assert float(scale.scale) == INITIAL_SCALE
    scale.update(BAD)
    assert float(scale.scale) == INITIAL_SCALE / 2
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(GOOD)
    assert float(scale.scale) == INITIAL_SCALE / 2, "an overflow resets the count"
    scale.update(GOOD)
    assert float(scale.scale) == INITIAL_SCALE
    for _ in range(GROWTH_INTERVAL):
        scale.update(GOOD)
    assert float(scale.scale) == 2 * INITIAL_SCALE, "doubling resets the count"


def test_stays_between_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = LossScale(CPU)
    for _ in range(300):
        scale.update(BAD)
    assert float(scale.scale) == loss_scale.MIN_SCALE
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 1)
    for _ in range(300):
        scale.update(GOOD)
    assert float(scale.scale) == loss_scale.MAX_SCALE


def test_state_is_restored_or_reset() -> None:
    used, other = LossScale(CPU), LossScale(CPU)
    for overflow in (BAD, GOOD, GOOD):
        used.update(overflow)
    saved = {name: tensor.clone() for name, tensor in used.state()}
    assert {name: tensor.item() for name, tensor in saved.items()} == {
        "scaler.scale": INITIAL_SCALE / 2,
        "scaler.good_steps": 2,
    }
    other.load(saved)
    assert dict(other.state()) == dict(used.state())
    other.load({})
    initial = {"scaler.scale": INITIAL_SCALE, "scaler.good_steps": 0}
    assert {name: tensor.item() for name, tensor in other.state()} == initial
