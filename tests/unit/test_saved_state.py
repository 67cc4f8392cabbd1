import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from distributed.config import TrainConfig, from_command_line
from distributed.optim.schedules import build_early_stopping, build_schedule
from distributed.run.saved_state import check_state, is_at_end
from distributed.training.state import TrainState
from distributed.training.totals import Totals

IMAGES, BATCH, STEPS = 50, 16, 4  # the last step of an epoch has 2 images
PLATEAU = ("--schedule.name", "plateau", "--schedule.patience", "2", "--schedule.cooldown", "1")
STOPPING = ("--early_stopping.patience", "3")


def config_of(*arguments: str) -> TrainConfig:
    common = "--data.name generated10 --epochs 5 --global_batch_size 16 --checkpoint.best_by accuracy"
    return from_command_line([*common.split(), "--data.validation_fraction", "0.1", *arguments]).config


def trained(config: TrainConfig, *, epochs: int, steps: int = 0) -> dict[str, Any]:
    """Return the state.json of a run after this many epochs and steps, with a window of two steps."""
    state = TrainState(build_schedule(config, steps_per_epoch=STEPS), build_early_stopping(config.early_stopping))
    for epoch in range(epochs + 1):
        for step in range(STEPS if epoch < epochs else steps):
            samples = min(BATCH, IMAGES - step * BATCH)
            state.finish_step(samples)
            state.add(Totals(loss=samples << 40, correct=samples // 2, correct5=samples, count=samples))
            if step % 2:
                state.pop_window()
        if epoch < epochs:
            state.pop_window()
            state.observe(Totals(loss=10 << 40, correct=(3, 5, 4, 4, 5)[epoch], count=10), best_by="accuracy")
            state.finish_epoch()
    return {"state": json.loads(json.dumps(state.state_dict()))}


@pytest.mark.parametrize("images", [None, IMAGES])
@pytest.mark.parametrize("arguments", [(), PLATEAU, STOPPING, (*PLATEAU, *STOPPING)])
@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0, 1), (0, 4), (1, 0), (2, 3), (3, 4), (4, 2), (5, 0)])
def test_every_state_of_a_run_is_accepted(arguments, epochs, steps, images):
    config = config_of(*arguments)
    check_state(trained(config, epochs=epochs, steps=steps), config, images=images)


def test_only_the_last_state_is_at_the_end():
    config = config_of()
    assert [epochs for epochs in range(6) if is_at_end(trained(config, epochs=epochs), config)] == [5]
    assert not is_at_end(trained(config, epochs=4, steps=4), config)


def test_early_stop_is_at_the_end():
    config = config_of("--early_stopping.patience", "2")
    found = trained(config, epochs=4)
    check_state(found, config, images=IMAGES)
    assert is_at_end(found, config)


def set_value(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            state = state[key]
        state[last] = value

    return change


def add_to(**by: int) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: state[key] + step for key, step in by.items()})


ODD = ["7", -1, 1.5, 3.0, True, math.nan, math.inf, [], {}, None, 2**70]
COUNTERS = ("epoch", "step", "step_in_epoch", "samples_seen")
OTHERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "an epoch beyond the run": set_value("epoch", value=6),
    "steps after the last epoch": add_to(epoch=2, step=2 * STEPS),
    "an epoch too many": add_to(epoch=1),
    "an epoch too few": add_to(epoch=-1),
    "a step too many": add_to(step=1),
    "a step too few": add_to(step=-1),
    "a step of the epoch too many": add_to(step_in_epoch=1),
    "steps beyond the epoch": add_to(step=3, step_in_epoch=3),
    "a sample too many": add_to(samples_seen=1),
    "a sample too few": add_to(samples_seen=-1),
    "no samples": set_value("samples_seen", value=0),
    "a best epoch to come": set_value("best", "epoch", value=3),
    "a best epoch at another step": set_value("best", "step", value=3),
    "a best value that is not an accuracy": set_value("best", "value", value=78.4),
    "a best value that is NaN": set_value("best", "value", value=math.nan),
    "a best epoch without a value": set_value("best", value={"epoch": 0, "step": 4}),
    "a window with another sample count": set_value("window", "count", value=1),
    "epoch totals with another sample count": set_value("epoch_totals", "count", value=99),
    "more right answers than samples": set_value("window", "correct", value=17),
    "a negative number of right answers": set_value("window", "correct5", value=-1),
    "a negative loss": set_value("window", "loss", value=-(1 << 60)),
    "a loss beyond any possible": set_value("window", "loss", value=1 << 200),
    "a loss that is NaN": set_value("window", "loss", value=math.nan),
    "a step that was not finite": set_value("window", "first_bad_step", value=3),
    "more skipped steps than steps": set_value("epoch_totals", "skipped_steps", value=4),
    "a state of another schedule": set_value("schedule", value={}),
    "a schedule that is null": set_value("schedule", value=None),
    "bad epochs beyond the patience": set_value("schedule", "bad_epochs", value=3),
    "more drops than epochs": set_value("schedule", "drops", value=4),
    "a negative number of drops": set_value("schedule", "drops", value=-1),
    "a cooldown beyond the setting": set_value("schedule", "cooldown_left", value=2),
    "a plateau's best that is not an accuracy": set_value("schedule", "best", value=1.5),
    "missing early stopping": set_value("early_stopping", value=None),
    "bad epochs beyond early stopping": set_value("early_stopping", "bad_epochs", value=4),
    "a stop without bad epochs": set_value("early_stopping", "stopped", value=True),
    "a stop that is not a boolean": set_value("early_stopping", "stopped", value=0),
}  # fmt: skip


@pytest.mark.parametrize("case", [*OTHERS, *(f"{name} = {value!r:.9}" for name in COUNTERS for value in ODD)])
@pytest.mark.parametrize("images", [None, IMAGES])
def test_impossible_counters_are_a_one_line_error(case, images):
    config = config_of(*PLATEAU, *STOPPING)
    content = trained(config, epochs=3, steps=3)
    if change := OTHERS.get(case):
        change(content["state"])
    else:
        name, _, shown = case.partition(" = ")
        content["state"][name] = next(value for value in ODD if f"{value!r:.9}" == shown)
    if images is None and case in ("a sample too many", "a sample too few"):
        check_state(content, config)  # detected only once the number of images is known
        return
    with pytest.raises(ValueError, match=r"^state\.json: ") as caught:
        check_state(content, config, images=images)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["epoch", "best", "window", "schedule", "early_stopping"])
def test_missing_counter_is_named(key):
    config = config_of()
    content = trained(config, epochs=1)
    del content["state"][key]
    with pytest.raises(ValueError, match=rf"^state\.json: {key} is missing$"):
        check_state(content, config)


def test_best_epoch_without_best_by_is_refused():
    config = config_of()
    without_best = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"best_by": "none"})})
    with pytest.raises(ValueError, match="best_by = none"):
        check_state(trained(config, epochs=2), without_best)


def test_state_of_a_stateless_schedule_is_refused():
    content = trained(config_of(*PLATEAU), epochs=2)
    with pytest.raises(ValueError, match="one_cycle has no state"):
        check_state(content, config_of())
