"""Learning-rate schedules over steps, the plateau rule, and early stopping."""

import json
import random

import pytest
import torch

from distributed.config import from_command_line
from distributed.optim.schedules import (
    Constant,
    Cosine,
    EarlyStopping,
    Linear,
    OneCycle,
    Patience,
    Plateau,
    Schedule,
    build_early_stopping,
    build_schedule,
)


def built(*arguments: str, epochs: int = 10, steps_per_epoch: int = 10) -> Schedule:
    config = from_command_line(["--epochs", str(epochs), *arguments]).config
    return build_schedule(config, steps_per_epoch=steps_per_epoch)


def plateau(metric: str = "accuracy", *, patience: int = 2, min_delta: float = 0.0, **more: int) -> Plateau:
    return Plateau(1.0, 0.1, Patience(metric, patience, min_delta), **more)  # type: ignore[arg-type]


def observed(schedule: Plateau | EarlyStopping, values: list[float]) -> list[str | None]:
    """Return the log line for each value, which is used for both metrics."""
    return [schedule.observe({"accuracy": value, "loss": value}) for value in values]


def rates(schedule: Plateau, values: list[float]) -> list[float]:
    """Return the rate after each value."""
    return [(observed(schedule, [value]), schedule.lr(0))[1] for value in values]


# Schedules over steps


def test_constant_rate_is_constant():
    assert [Constant(0.3).lr(step) for step in (0, 1, 1000)] == [0.3] * 3


def test_constant_rate_warms_up_linearly():
    assert [Constant(0.4, 4).lr(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_decays_from_first_to_last_step():
    rate = [Cosine(0.4, total_steps=21, final=0.1).lr(step) for step in range(21)]
    assert rate[0] == 0.4
    assert rate[10] == pytest.approx(0.25)
    assert rate[20] == pytest.approx(0.1)
    assert rate == sorted(set(rate), reverse=True)


def test_cosine_warms_up_linearly():
    schedule = Cosine(0.4, total_steps=14, warmup_steps=4)
    assert [schedule.lr(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert schedule.lr(13) == pytest.approx(0, abs=1e-15)


def test_linear_decay_ends_one_step_after_the_last():
    schedule = Linear(0.8, total_steps=10, warmup_steps=2, final=0.0)
    assert [schedule.lr(step) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.4, 0.8, 0.8, 0.4, 0.1])
    assert Linear(1.0, total_steps=4, final=0.2).lr(3) == pytest.approx(0.4)


def test_one_cycle_rises_to_the_peak_then_decays():
    rate = [OneCycle(1.0, total_steps=41, rising_steps=10, start=0.2, final=0.0).lr(step) for step in range(41)]
    assert rate[0] == pytest.approx(0.2)
    assert rate[5] == pytest.approx(0.6)
    assert rate[10] == max(rate) == 1.0
    assert rate[25] == pytest.approx(0.5)
    assert rate[40] == pytest.approx(0, abs=1e-15)
    assert rate[:11] == sorted(rate[:11])
    assert rate[10:] == sorted(rate[10:], reverse=True)


def test_steps_past_the_end_keep_the_final_rate():
    assert Cosine(0.4, total_steps=5, final=0.1).lr(9) == pytest.approx(0.1)
    assert Linear(0.4, total_steps=5, final=0.1).lr(9) == pytest.approx(0.1)
    assert OneCycle(1.0, 10, 3, 0.1, 0.05).lr(30) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "one_cycle", "plateau"])
def test_a_single_step_run_has_a_positive_rate(name):
    assert built("--schedule.name", name, epochs=1, steps_per_epoch=1).lr(0) > 0


def test_build_schedule_converts_epochs_to_steps():
    peak = ["--optim.lr", "0.4"]
    assert built(*peak, "--schedule.name", "constant", "--schedule.warmup_epochs", "0.5") == Constant(0.4, 5)
    cosine = ["--schedule.name", "cosine", "--schedule.warmup_epochs", "2", "--schedule.final_factor", "0.5"]
    assert built(*peak, *cosine) == Cosine(0.4, 100, 20, 0.2)
    linear = ["--schedule.name", "linear", "--schedule.warmup_epochs", "1", "--schedule.final_factor", "0.5"]
    assert built(*peak, *linear) == Linear(0.4, 100, 10, 0.2)
    one_cycle = ["--schedule.warmup_fraction", "0.3", "--schedule.start_factor", "0.5", "--schedule.final_factor", "0"]
    assert built(*peak, *one_cycle) == OneCycle(0.4, 100, 30, 0.2, 0.0)
    plateau_keys = "--schedule.name plateau --schedule.metric loss --schedule.factor 0.5 --schedule.patience 3"
    more = "--schedule.min_delta 0.01 --schedule.cooldown 2 --schedule.max_drops none"
    assert built(*peak, *plateau_keys.split(), *more.split()) == Plateau(0.4, 0.5, Patience("loss", 3, 0.01), 2, None)


def test_lr_scaling_applies_to_the_peak():
    arguments = ["--optim.lr_scaling", "linear", "--optim.lr_base_batch", "64", "--schedule.name", "constant"]
    assert built(*arguments).lr(0) == pytest.approx(0.2)


def test_stateless_schedules_reject_foreign_state():
    for schedule in (Constant(1.0), Cosine(1.0, 5), Linear(1.0, 5), OneCycle(1.0, 5, 1, 0.1, 0.0)):
        assert schedule.state_dict() == {}
        assert schedule.observe({"accuracy": 0.5, "loss": 1.0}) is None
        schedule.load_state_dict({})
        with pytest.raises(ValueError, match=r"has no state, but the checkpoint contains \['drops'\]"):
            schedule.load_state_dict({"drops": 1})


# Plateau


def test_plateau_drops_after_patience_plus_one_bad_epochs():
    assert rates(plateau(patience=2), [0.5, 0.5, 0.4, 0.5, 0.5]) == pytest.approx([1, 1, 1, 0.1, 0.1])


def test_plateau_without_patience_drops_at_once():
    assert rates(plateau(patience=0), [0.5, 0.5, 0.6, 0.5]) == pytest.approx([1, 0.1, 0.1, 0.01])


def test_improvement_resets_the_patience():
    assert rates(plateau(patience=1), [0.5, 0.4, 0.6, 0.5, 0.5]) == pytest.approx([1, 1, 1, 1, 0.1])


def test_a_lower_loss_is_an_improvement():
    assert rates(plateau("loss", patience=0), [2.0, 1.5, 1.6]) == pytest.approx([1, 1, 0.1])


def test_plateau_reads_the_configured_metric():
    schedule = plateau("loss", patience=0)
    schedule.observe({"accuracy": 0.5, "loss": 1.0})
    schedule.observe({"accuracy": 0.4, "loss": 0.9})
    assert schedule.lr(0) == 1.0


@pytest.mark.parametrize(("metric", "values"), [("accuracy", [0.5, 0.55, 0.6]), ("loss", [1.0, 0.95, 0.9])])
def test_min_delta_is_relative_to_the_best(metric, values):
    assert rates(plateau(metric, patience=1, min_delta=0.11), values) == pytest.approx([1, 1, 0.1])
    assert rates(plateau(metric, patience=1, min_delta=0.08), values) == pytest.approx([1, 1, 1])


def test_cooldown_epochs_do_not_count_as_bad():
    schedule = plateau(patience=1, cooldown=2)
    assert rates(schedule, [0.5] * 7) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01])


def test_improvements_count_towards_the_cooldown():
    schedule = plateau(patience=0, cooldown=2)
    assert rates(schedule, [0.5, 0.5, 0.6, 0.6, 0.6]) == pytest.approx([1, 0.1, 0.1, 0.1, 0.01])


def test_plateau_drops_at_most_max_drops_times():
    assert rates(plateau(patience=0, max_drops=2), [0.5] * 5) == pytest.approx([1, 0.1, 0.01, 0.01, 0.01])
    assert rates(plateau(patience=0, max_drops=0), [0.5] * 3) == [1, 1, 1]


def test_plateau_log_lines_show_comparison_and_counts():
    schedule = plateau(patience=1, cooldown=1, max_drops=1)
    schedule.peak = 0.05
    assert observed(schedule, [0.784, 0.781, 0.784, 0.7, 0.7]) == [
        None,
        "plateau: val accuracy 78.10% not above 78.40% + 0.00%; bad epoch 1, patience 1",
        "plateau: val accuracy 78.40% not above 78.40% + 0.00%; bad epoch 2, patience 1: lr 0.05 -> 0.005 (drop 1 of 1)",
        "plateau: val accuracy 70.00% not above 78.40% + 0.00%; cooldown, epochs left: 0",
        "plateau: val accuracy 70.00% not above 78.40% + 0.00%; max_drops = 1 reached, lr stays 0.005",
    ]


def test_plateau_log_line_for_loss():
    (_, line) = observed(plateau("loss", patience=3, min_delta=0.01), [1.5, 1.495])
    assert line == "plateau: val loss 1.4950 not below 1.5000 - 0.0100; bad epoch 1, patience 3"


def test_plateau_log_line_without_max_drops():
    assert observed(plateau(patience=0), [0.5, 0.5])[-1].endswith("lr 1 -> 0.1 (drop 1)")


@pytest.mark.parametrize("restart", range(1, 12))
def test_restart_within_the_patience_changes_nothing(restart):
    values = [0.5, 0.6, 0.6, 0.55, 0.6, 0.61, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    settings = {"patience": 2, "cooldown": 1, "max_drops": 2}
    undisturbed, first, second = (plateau(**settings) for _ in range(3))
    expected = observed(undisturbed, values)
    before = observed(first, values[:restart])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + observed(second, values[restart:]) == expected
    assert second == undisturbed
    assert undisturbed.drops == 2


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("seed", range(25))
def test_plateau_matches_torchs_reduce_lr_on_plateau(metric, seed):
    draw = random.Random(seed)
    patience, cooldown = draw.randrange(4), draw.randrange(4)
    min_delta, factor = draw.choice([0.0, 0.05]), draw.choice([0.1, 0.5])
    ours = Plateau(1.0, factor, Patience(metric, patience, min_delta), cooldown)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if metric == "accuracy" else "min", factor=factor, patience=patience, cooldown=cooldown,
        threshold=min_delta, threshold_mode="abs", eps=0.0,
    )  # fmt: skip
    for epoch in range(60):
        value = round(draw.random() + 0.01 * epoch, 2)
        ours.observe({"accuracy": value, "loss": value})
        theirs.step(value)
        assert ours.lr(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), epoch
    assert ours.drops > 0


# Early stopping


def test_early_stopping_after_patience_bad_epochs():
    rule = EarlyStopping(Patience("accuracy", 2))
    log_lines = observed(rule, [0.5, 0.4, 0.6, 0.6])
    assert not rule.stopped
    assert log_lines[-1] == "early stopping: val accuracy 60.00% not above 60.00% + 0.00%; bad epoch 1 of 2"
    assert observed(rule, [0.5])[0].endswith("bad epoch 2 of 2; the run ends")
    assert rule.stopped


def test_early_stopping_survives_a_restart():
    first, second = EarlyStopping(Patience("loss", 3)), EarlyStopping(Patience("loss", 3))
    observed(first, [1.0, 1.0, 1.0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second == first
    observed(second, [1.0])
    assert second.stopped


def test_build_early_stopping_from_optional_section():
    config = from_command_line(["--early_stopping.metric", "loss", "--early_stopping.patience", "4"]).config
    assert build_early_stopping(config.early_stopping) == EarlyStopping(Patience("loss", 4, 0.0))
    assert build_early_stopping(None) is None
