"""Validation of a checkpoint's state.json before a run resumes from it. Imports no torch.

Digests only prove that a file is unchanged since it was written. These checks prove that its counters belong to this run:
each is in range, and all are consistent.
"""

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distributed.config import TrainConfig, schedules
from distributed.config.functions import ImportedLoss

Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(allow_inf_nan=False)]

_LARGEST_LOSS, _ROUNDING = 53 + 40, 40 - 10
"""Exponents of the largest sum that one sample can add, and of its rounding error, in training.totals' 40 fraction bits."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Best(_Record):
    epoch: Count
    step: Count
    value: Number


class _Totals(_Record):
    loss: int
    correct: Count
    correct5: Count
    count: Count
    first_bad_step: None = None
    skipped_steps: Count = 0


class _Patience(_Record):
    best: Number | None
    bad_epochs: Count


class _Plateau(_Patience):
    drops: Count
    cooldown_left: Count


class _EarlyStopping(_Patience):
    stopped: bool


class _Counters(_Record):
    epoch: Count
    step: Count
    step_in_epoch: Count
    samples_seen: Count
    best: _Best | None
    window: _Totals
    epoch_totals: _Totals
    schedule: dict[str, Any]
    early_stopping: _EarlyStopping | None


def check_state(content: dict[str, Any], config: TrainConfig, *, images: int | None = None) -> None:
    """Check the counters of a state.json against the config that it was saved under.

    Args:
        images: number of training images, if known, which makes the checks exact.

    Raises:
        ValueError: a counter is not a number, out of range, or inconsistent with another. A one-line message.
    """
    if not isinstance(content.get("state"), dict):
        raise ValueError("state.json: state is missing or from another version")
    try:
        counters = _Counters.model_validate(content["state"])
        is_plateau = isinstance(config.schedule, schedules.Plateau)
        schedule = _Plateau.model_validate(counters.schedule) if is_plateau else None
    except ValidationError as error:
        first = error.errors()[0]
        name, found = ".".join(map(str, first["loc"])), repr(first["input"])
        problem = "is missing" if first["type"] == "missing" else f"= {found[:60]}: {first['msg'].lower()}"
        raise ValueError(f"state.json: {name} {problem}") from None
    if schedule is None and counters.schedule:
        raise ValueError(
            f"state.json: schedule {config.schedule.name} has no state, but found {sorted(counters.schedule)[:5]}"
        )
    for mismatch in (
        _check_position(counters, config, images),
        _check_totals(counters, config, images),
        _check_best(counters, config),
        _check_schedule(counters, schedule, config),
        _check_early_stopping(counters, config),
    ):
        if mismatch:
            raise ValueError(f"state.json: {mismatch}")


class Trained(NamedTuple):
    """Number of finished epochs, and of steps in the next one."""

    epochs: int
    steps: int


def trained_so_far(content: dict[str, Any]) -> Trained:
    """Return how far a run was trained according to its state.json, which must be checked already."""
    return Trained(content["state"]["epoch"], content["state"]["step_in_epoch"])


def is_at_end(content: dict[str, Any], config: TrainConfig) -> bool:
    """Whether the run has no steps left: all epochs are done, or it stopped early. The state.json must be checked already."""
    stopping = content["state"]["early_stopping"]
    return trained_so_far(content) == Trained(config.epochs, 0) or bool(stopping and stopping["stopped"])


def _check_position(found: _Counters, config: TrainConfig, images: int | None) -> str | None:
    """Return how epoch, step, step_in_epoch and samples_seen disagree, or None, like all checks below."""
    epoch, in_epoch, batch = found.epoch, found.step_in_epoch, config.global_batch_size
    before = found.step - in_epoch  # steps in finished epochs
    if epoch > config.epochs:
        return f"epoch = {epoch} is beyond the {config.epochs} of the run"
    if epoch == config.epochs and in_epoch:
        return f"step_in_epoch = {in_epoch} is beyond the {config.epochs} epochs of the run"
    if images is not None:
        steps = -(-images // batch)
        if before != epoch * steps:
            return f"step = {found.step} is not step {in_epoch} after {epoch} epochs of {steps} steps"
    elif before < epoch or (before if epoch == 0 else before % epoch):
        return f"step = {found.step} does not agree with epoch = {epoch} and step_in_epoch = {in_epoch}"
    else:
        steps = before // epoch if epoch else in_epoch
    if in_epoch > steps:
        return f"step_in_epoch = {in_epoch} is beyond the {steps} steps of an epoch"
    least, most = _sample_range(epoch, in_epoch, steps, batch, images)
    if not least <= found.samples_seen <= most:
        return f"samples_seen = {found.samples_seen} does not agree with step = {found.step}"
    return None


def _sample_range(epoch: int, in_epoch: int, steps: int, batch: int, images: int | None) -> tuple[int, int]:
    """Return the least and greatest number of samples after these epochs and steps. An epoch's last step may be smaller."""
    if images is not None:
        exact = epoch * images + min(in_epoch * batch, images)
        return exact, exact
    most = (epoch * steps + in_epoch) * batch
    return most - (epoch + (in_epoch == steps and steps > 0)) * (batch - 1), most


def _check_totals(found: _Counters, config: TrainConfig, images: int | None) -> str | None:
    steps, both = found.step_in_epoch, {"window": found.window, "epoch_totals": found.epoch_totals}
    for name, totals in both.items():
        # Rounding may make the loss of a confident prediction slightly negative.
        least = -totals.count << (_LARGEST_LOSS if _may_be_negative(config) else _ROUNDING)
        in_range = least <= totals.loss <= totals.count << _LARGEST_LOSS
        if not in_range or max(totals.correct, totals.correct5) > totals.count or totals.skipped_steps > steps:
            return f"{name} = {str(totals)[:120]}: impossible for {totals.count} samples"
    least, most = _sample_range(0, steps, steps, config.global_batch_size, images)
    if not least <= (count := found.window.count + found.epoch_totals.count) <= most:
        return f"window and epoch_totals count {count} samples, but step_in_epoch = {steps}"
    return None


def _check_best(found: _Counters, config: TrainConfig) -> str | None:
    best, by = found.best, config.best_by
    if best is None:
        return None
    if by is None:
        return f"best is epoch {best.epoch}, but checkpoint.best_by = none"
    if best.epoch >= found.epoch or best.step * found.epoch != (best.epoch + 1) * (found.step - found.step_in_epoch):
        return f"best.epoch = {best.epoch} and best.step = {best.step} are not the end of one of {found.epoch} epochs"
    return None if _is_metric(best.value, by, config) else f"best.value = {best.value} is not a possible {by}"


def _check_schedule(found: _Counters, schedule: _Plateau | None, config: TrainConfig) -> str | None:
    if schedule is None or not isinstance(config.schedule, schedules.Plateau):
        return None
    most = found.epoch if config.schedule.max_drops is None else min(found.epoch, config.schedule.max_drops)
    if schedule.drops > most:
        return f"schedule.drops = {schedule.drops} is more than the possible {most}"
    if schedule.cooldown_left > config.schedule.cooldown:
        return f"schedule.cooldown_left = {schedule.cooldown_left} is more than {config.schedule.cooldown}"
    return _check_patience("schedule", schedule, found, config.schedule, config)


def _check_early_stopping(found: _Counters, config: TrainConfig) -> str | None:
    state, section = found.early_stopping, config.early_stopping
    if (state is None) != (section is None):
        return f"early_stopping = {state}, but the config has {section}"[:200]
    if state is None or section is None:
        return None
    if state.stopped != (state.bad_epochs >= section.patience):
        return f"early_stopping.stopped = {state.stopped} does not agree with bad_epochs"
    return _check_patience("early_stopping", state, found, section, config)


def _check_patience(name: str, state: _Patience, found: _Counters, section: Any, config: TrainConfig) -> str | None:
    if state.bad_epochs > (most := min(found.epoch, section.patience)):
        return f"{name}.bad_epochs = {state.bad_epochs} is more than the possible {most}"
    if state.best is not None and not _is_metric(state.best, section.metric, config):
        return f"{name}.best = {state.best} is not a possible {section.metric}"
    return None


def _is_metric(value: float, metric: str, config: TrainConfig) -> bool:
    return 0 <= value <= 1 if metric == "accuracy" else value >= -0.01 or _may_be_negative(config)


def _may_be_negative(config: TrainConfig) -> bool:
    """Whether the loss may be negative: a user's may, cross-entropy cannot."""
    return isinstance(config.loss, ImportedLoss)
