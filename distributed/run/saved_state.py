"""The check of a checkpoint's state.json before a run resumes from it. Imports no torch.

Digests only prove that a file is as it was written. These checks prove that its counters are numbers of this run: each in
its range, and all in agreement.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distributed.config import TrainConfig, schedules

Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Best(_Record):
    epoch: Count
    step: Count
    value: Number


class _Sums(_Record):
    loss: int
    correct: Count
    correct5: Count
    count: Count
    first_bad_step: None = None
    skipped_steps: Count = 0


class _Watch(_Record):
    best: Number | None
    bad_epochs: Count


class _Plateau(_Watch):
    drops: Count
    cooldown_left: Count


class _Stopping(_Watch):
    stopped: bool


class _Counters(_Record):
    epoch: Count
    step: Count
    step_in_epoch: Count
    samples_seen: Count
    best: _Best | None
    window: _Sums
    epoch_totals: _Sums
    schedule: dict[str, Any]
    early_stopping: _Stopping | None


def check_state(content: dict[str, Any], config: TrainConfig, *, images: int | None = None) -> None:
    """Check the counters in a state.json against the config that it was saved under.

    Args:
        images: number of training images if it is known already; the checks are exact then.

    Raises:
        ValueError: a counter is no number, out of range, or disagrees with another; one line.
    """
    if not isinstance(content.get("state"), dict):
        raise ValueError("state in state.json: of another version")
    try:
        counters = _Counters.model_validate(content["state"])
        plateau = isinstance(config.schedule, schedules.Plateau)
        schedule = _Plateau.model_validate(counters.schedule) if plateau else None
    except ValidationError as error:
        first = error.errors()[0]
        name, found = ".".join(map(str, first["loc"])), repr(first["input"])
        said = "is missing" if first["type"] == "missing" else f"= {found[:60]}: {first['msg'].lower()}"
        raise ValueError(f"state.json: {name} {said}") from None
    if schedule is None and counters.schedule:
        raise ValueError(
            f"state.json: {config.schedule.name} has no state, and there is {sorted(counters.schedule)[:5]}"
        )
    for problem in (
        _of_place(counters, config, images),
        _of_sums(counters, config, images),
        _of_best(counters, config),
        _of_watches(counters, schedule, config),
    ):
        if problem:
            raise ValueError(f"state.json: {problem}")


def trained_epochs(content: dict[str, Any]) -> tuple[int, int]:
    """The number of finished epochs, and of steps in the next, by a state.json that was checked."""
    return content["state"]["epoch"], content["state"]["step_in_epoch"]


def is_at_end(content: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a state.json that was checked is that of the end of the run."""
    stopping = content["state"]["early_stopping"]
    return trained_epochs(content) == (config.epochs, 0) or bool(stopping and stopping["stopped"])


def _of_place(found: _Counters, config: TrainConfig, images: int | None) -> str | None:
    epoch, in_epoch, batch = found.epoch, found.step_in_epoch, config.global_batch_size
    before = found.step - in_epoch
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
    least, most = _samples(epoch, in_epoch, steps, batch, images)
    if not least <= found.samples_seen <= most:
        return f"samples_seen = {found.samples_seen} does not agree with step = {found.step}"
    return None


def _samples(epoch: int, in_epoch: int, steps: int, batch: int, images: int | None) -> tuple[int, int]:
    """Minimum and maximum number of samples after these epochs and steps; the last step of an epoch may be smaller."""
    if images is not None:
        exact = epoch * images + min(in_epoch * batch, images)
        return exact, exact
    most = (epoch * steps + in_epoch) * batch
    return most - (epoch + (in_epoch == steps > 0)) * (batch - 1), most


def _of_sums(found: _Counters, config: TrainConfig, images: int | None) -> str | None:
    steps, sums = found.step_in_epoch, {"window": found.window, "epoch_totals": found.epoch_totals}
    for name, part in sums.items():
        # Rounding may take the loss of a certain answer just below zero.
        in_range = -part.count << 30 <= part.loss <= part.count << 93
        if not in_range or max(part.correct, part.correct5) > part.count or part.skipped_steps > steps:
            return f"{name} = {str(part)[:120]}: not the sums of {part.count} samples"
    least, most = _samples(0, steps, steps, config.global_batch_size, images)
    if not least <= (count := found.window.count + found.epoch_totals.count) <= most:
        return f"window and epoch_totals hold {count} samples, and step_in_epoch = {steps}"
    return None


def _of_best(found: _Counters, config: TrainConfig) -> str | None:
    best, by = found.best, config.best_by
    if best is None:
        return None
    if by is None:
        return f"best is epoch {best.epoch}, and checkpoint.best_by = none"
    if best.epoch >= found.epoch or best.step * found.epoch != (best.epoch + 1) * (found.step - found.step_in_epoch):
        return f"best.epoch = {best.epoch} and best.step = {best.step} are no end of the {found.epoch} epochs so far"
    return None if _is_metric(best.value, by) else f"best.value = {best.value} is no {by}"


def _of_watches(found: _Counters, schedule: _Plateau | None, config: TrainConfig) -> str | None:
    watches: list[tuple[str, _Watch, Any]] = []
    if schedule and isinstance(config.schedule, schedules.Plateau):
        most = found.epoch if config.schedule.max_drops is None else min(found.epoch, config.schedule.max_drops)
        if schedule.drops > most:
            return f"schedule.drops = {schedule.drops} is more than the {most} that there can be"
        if schedule.cooldown_left > config.schedule.cooldown:
            return f"schedule.cooldown_left = {schedule.cooldown_left} is more than {config.schedule.cooldown}"
        watches.append(("schedule", schedule, config.schedule))
    if (found.early_stopping is None) != (config.early_stopping is None):
        return f"early_stopping = {found.early_stopping}, and the run's is {config.early_stopping}"[:200]
    if found.early_stopping and config.early_stopping:
        watches.append(("early_stopping", found.early_stopping, config.early_stopping))
        if found.early_stopping.stopped != (found.early_stopping.bad_epochs >= config.early_stopping.patience):
            return f"early_stopping.stopped = {found.early_stopping.stopped} does not agree with bad_epochs"
    for name, watch, section in watches:
        if watch.bad_epochs > (most := min(found.epoch, section.patience)):
            return f"{name}.bad_epochs = {watch.bad_epochs} is more than the {most} that there can be"
        if watch.best is not None and not _is_metric(watch.best, section.metric):
            return f"{name}.best = {watch.best} is no {section.metric}"
    return None


def _is_metric(value: float, metric: str) -> bool:
    return 0 <= value <= 1 if metric == "accuracy" else value >= -0.01
