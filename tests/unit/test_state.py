import json
from contextlib import suppress

import pytest

from distributed.errors import ExitCode, NotFiniteError
from distributed.optim.schedules import Constant, EarlyStopping, Patience, Plateau
from distributed.training.state import Best, TrainState
from distributed.training.totals import Totals


def fresh() -> TrainState:
    return TrainState(Plateau(1.0, 0.1, Patience("accuracy", 2)), EarlyStopping(Patience("accuracy", 5)))


def validation(correct: int, loss: float = 1.0) -> Totals:
    return Totals(loss=round(loss * 100 * 2**40), correct=correct, count=100)


def used() -> TrainState:
    state = fresh()
    for correct in (50, 60, 55, 55):
        state.finish_step(16)
        state.observe(validation(correct), best_by="accuracy")
        state.finish_epoch()
    state.finish_step(16)
    state.add(Totals(5, 4, 5, 16))
    state.pop_window()
    state.add(Totals(7, 1, 2, 16))
    return state


def test_the_state_survives_json():
    state, resumed = used(), fresh()
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert resumed == state
    assert (resumed.epoch, resumed.step, resumed.step_in_epoch, resumed.samples_seen) == (4, 5, 1, 80)
    assert resumed.best == Best(epoch=1, step=2, value=0.6)
    assert resumed.window == Totals(7, 1, 2, 16)
    assert resumed.epoch_totals == Totals(5, 4, 5, 16)


def test_a_state_without_best_or_early_stopping_survives_json():
    state, resumed = TrainState(Constant(1.0)), TrainState(Constant(1.0))
    state.finish_step(3)
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert resumed == state


def test_the_stop_reason_is_not_saved():
    state, resumed = used(), fresh()
    state.stop_reason = "SIGTERM"
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert resumed.stop_reason is None


def test_a_resumed_state_makes_the_same_decisions():
    state, resumed = used(), fresh()
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    for correct in (55, 55, 61):
        both = [s.observe(validation(correct), best_by="accuracy") for s in (state, resumed)]
        assert both[0] == both[1]
    assert resumed == state


def test_the_best_epoch_is_the_first_with_the_highest_accuracy():
    state = fresh()
    assert [state.observe(validation(c), best_by="accuracy")[0] for c in (50, 60, 60, 59, 61)] == [
        True, True, False, False, True,
    ]  # fmt: skip


def test_the_best_epoch_by_loss_is_the_lowest():
    state = fresh()
    is_best = [state.observe(validation(50, loss), best_by="loss")[0] for loss in (2.0, 1.5, 1.5, 1.6, 1.4)]
    assert is_best == [True, True, False, False, True]
    assert state.best is not None
    assert state.best.value == pytest.approx(1.4)


def test_without_best_by_no_epoch_is_best():
    state = fresh()
    assert state.observe(validation(50), best_by=None)[0] is False
    assert state.best is None


def test_without_validation_nothing_is_decided():
    state = fresh()
    assert state.observe(None, best_by=None) == (False, [])


def test_schedule_and_early_stopping_both_decide():
    state = fresh()
    assert state.observe(validation(50), best_by="accuracy") == (True, [])
    _, decisions = state.observe(validation(40), best_by="accuracy")
    assert [decision.split(":")[0] for decision in decisions] == ["plateau", "early stopping"]


def test_early_stopping_ends_the_run():
    state = fresh()
    for _ in range(6):
        assert not state.stopped_early
        state.observe(validation(50), best_by="accuracy")
    assert state.stopped_early


def test_a_loss_that_is_not_finite_names_its_step():
    state = fresh()
    with pytest.raises(NotFiniteError, match="at step 1: set a lower") as caught:
        state.add(Totals(count=16, first_bad_step=0))
    assert caught.value.exit_code == ExitCode.NOT_FINITE
    assert state.window == Totals()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_only_float16_may_skip_a_gradient_that_is_not_finite(precision):
    """Otherwise the weights are not finite either, and a checkpoint must not have them."""
    state = TrainState(Constant(0.1), precision=precision, step=7)
    totals = Totals(count=16, skipped_steps=1)
    if precision == "float16":
        state.add(totals)
        assert state.window == totals
        return
    with pytest.raises(NotFiniteError, match="a gradient was not, in the steps up to 7"):
        state.add(totals)
    assert state.window == Totals()


def test_float16_ends_if_no_scale_makes_gradients_finite():
    state = TrainState(Constant(0.1), precision="float16")

    def read(*, skipped: int, steps: int = 10) -> None:
        state.step += steps
        state.add(Totals(count=16 * steps, skipped_steps=skipped))

    for _ in range(20):
        read(skipped=9)
    for _ in range(9):
        read(skipped=10)
    state.add(Totals())  # a save right after a logging step
    read(skipped=10)
    with pytest.raises(NotFiniteError, match="precision = float16: no gradient was finite in the last 110 steps"):
        read(skipped=10)


def test_a_validation_loss_that_is_not_finite_is_never_best():
    state = fresh()
    state.observe(validation(50), best_by="loss")
    with suppress(NotFiniteError):  # to say so is as good
        state.observe(Totals(loss=0, correct=90, count=100, first_bad_step=0), best_by="loss")
    assert state.best is not None
    assert state.best.value == pytest.approx(1.0)


def test_a_new_epoch_resets_its_totals():
    state = used()
    state.pop_window()
    assert state.epoch_totals == Totals(12, 5, 7, 32)
    state.finish_epoch()
    assert (state.epoch, state.step_in_epoch, state.epoch_totals) == (5, 0, Totals())
