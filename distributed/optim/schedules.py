"""Learning-rate schedules and early stopping: plain dataclasses whose state is a few numbers.

Every rank observes the same reduced metrics, so all ranks make the same decisions. The state is saved in every checkpoint, so
a restart within the patience window changes nothing.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from distributed.config import TrainConfig, schedules

Metric = Literal["accuracy", "loss"]


class Schedule(Protocol):
    """The learning rate as a function of the step and of past validation metrics."""

    restore_best_now: bool
    """Whether the last observation requires restoring the run's best weights."""

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over the entire run."""
        ...

    def observe(self, metrics: dict[Metric, float]) -> str | None:
        """Record an epoch's validation metrics. Return a log line if they led to a decision, else None."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Stateless:
    restore_best_now = False

    def observe(self, metrics: dict[Metric, float]) -> str | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(
                f"schedule: {type(self).__name__} has no state, but the checkpoint contains {sorted(state)}"
            )


@dataclass
class Constant(_Stateless):
    """A constant rate after a linear warm-up."""

    peak: float
    warmup_steps: int = 0

    def lr(self, step: int) -> float:
        return self.peak * min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass
class _Warmed(_Stateless):
    """Linear warm-up to `peak`, then a decay to `final`."""

    peak: float
    total_steps: int
    warmup_steps: int = 0
    final: float = 0.0

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self._decayed(step - self.warmup_steps, self.total_steps - self.warmup_steps)

    def _decayed(self, step: int, steps: int) -> float:
        """Return the rate of step number `step` of the decay, which has `steps`."""
        raise NotImplementedError


class Cosine(_Warmed):
    """Linear warm-up, then cosine decay from `peak` to `final` (Loshchilov and Hutter 2017, arXiv 1608.03983)."""

    def _decayed(self, step: int, steps: int) -> float:
        return _half_cosine(self.peak, self.final, step, steps - 1)


class Linear(_Warmed):
    """Linear warm-up, then linear decay from `peak` to `final`, which it would reach one step after the last."""

    def _decayed(self, step: int, steps: int) -> float:
        return self.peak + (self.final - self.peak) * min(1.0, step / steps)


@dataclass
class OneCycle(_Stateless):
    """Half-cosine rise from `start` to `peak`, then half-cosine decay to `final` (Smith and Topin 2018, arXiv 1708.07120)."""

    peak: float
    total_steps: int
    rising_steps: int
    start: float
    final: float

    def lr(self, step: int) -> float:
        if step < self.rising_steps:
            return _half_cosine(self.start, self.peak, step, self.rising_steps)
        return _half_cosine(self.peak, self.final, step - self.rising_steps, self.total_steps - self.rising_steps - 1)


def _half_cosine(start: float, end: float, step: int, steps: int) -> float:
    progress = min(1.0, step / max(1, steps))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Patience:
    """The best value, and how many consecutive epochs did not improve on it by more than `min_delta`. The callers count."""

    metric: Metric
    limit: int
    min_delta: float = 0.0
    best: float | None = None
    bad_epochs: int = 0

    def update_best(self, value: float) -> bool:
        """Record a new best value and reset the count. Returns whether it is one."""
        higher = self.metric == "accuracy"
        better = self.best is None or (
            value > self.best + self.min_delta if higher else value < self.best - self.min_delta
        )
        if better:
            self.best, self.bad_epochs = value, 0
        return better

    def comparison(self, value: float) -> str:
        """Return e.g. `val accuracy 78.10% not above 78.40% + 0.00%`."""
        assert self.best is not None
        if self.metric == "accuracy":
            return f"val accuracy {value:.2%} not above {self.best:.2%} + {self.min_delta:.2%}"
        return f"val loss {value:.4f} not below {self.best:.4f} - {self.min_delta:.4f}"


@dataclass
class Plateau:
    """Multiplies the rate by `factor` after more than `patience` consecutive epochs without improvement.

    Follows torch's ReduceLROnPlateau with an absolute threshold: bad epochs are not counted during the cooldown after a drop.
    Drops at most `max_drops` times.
    """

    peak: float
    factor: float
    patience: Patience
    cooldown: int = 0
    max_drops: int | None = None
    restore_best_on_drop: bool = False
    drops: int = 0
    cooldown_left: int = 0
    restore_best_now: bool = False

    def lr(self, step: int) -> float:
        return self.peak * self.factor**self.drops

    def observe(self, metrics: dict[Metric, float]) -> str | None:
        value, patience = metrics[self.patience.metric], self.patience
        self.restore_best_now = False
        if patience.update_best(value):
            self.cooldown_left = max(0, self.cooldown_left - 1)
            return None
        line = f"plateau: {patience.comparison(value)}; "
        if self.cooldown_left:
            self.cooldown_left -= 1
            return line + f"cooldown, epochs left: {self.cooldown_left}"
        if self.max_drops is not None and self.drops >= self.max_drops:
            return line + f"max_drops = {self.max_drops} reached, lr stays {self.lr(0):.3g}"
        patience.bad_epochs += 1
        line += f"bad epoch {patience.bad_epochs}, patience {patience.limit}"
        return line if patience.bad_epochs <= patience.limit else line + self._drop()

    def _drop(self) -> str:
        old = self.lr(0)
        self.drops += 1
        self.patience.bad_epochs, self.cooldown_left = 0, self.cooldown
        self.restore_best_now = self.restore_best_on_drop
        drop = f"drop {self.drops}" + (f" of {self.max_drops}" if self.max_drops is not None else "")
        return f": lr {old:.3g} -> {self.lr(0):.3g} ({drop})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.patience.best,
            "bad_epochs": self.patience.bad_epochs,
            "drops": self.drops,
            "cooldown_left": self.cooldown_left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.patience.best, self.patience.bad_epochs = state["best"], state["bad_epochs"]
        self.drops, self.cooldown_left = state["drops"], state["cooldown_left"]


@dataclass
class EarlyStopping:
    """Ends the run after `patience.limit` consecutive epochs without improvement."""

    patience: Patience
    stopped: bool = field(default=False)

    def observe(self, metrics: dict[Metric, float]) -> str | None:
        """Record an epoch's validation metrics and set `stopped` if the run should end.

        Return a log line if there was no improvement, else None.
        """
        value, patience = metrics[self.patience.metric], self.patience
        if patience.update_best(value):
            return None
        patience.bad_epochs += 1
        self.stopped = patience.bad_epochs >= patience.limit
        end = "; the run ends" if self.stopped else ""
        return f"early stopping: {patience.comparison(value)}; bad epoch {patience.bad_epochs} of {patience.limit}{end}"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.patience.best, "bad_epochs": self.patience.bad_epochs, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.patience.best, self.patience.bad_epochs = state["best"], state["bad_epochs"]
        self.stopped = state["stopped"]


def build_schedule(config: TrainConfig, *, steps_per_epoch: int) -> Schedule:
    """Build the schedule of the config's section; epochs become steps of this run."""
    section, peak, total = config.schedule, config.peak_lr, config.epochs * steps_per_epoch
    if isinstance(section, schedules.Constant):
        return Constant(peak, round(section.warmup_epochs * steps_per_epoch))
    if isinstance(section, schedules.Cosine | schedules.Linear):
        kind = Cosine if isinstance(section, schedules.Cosine) else Linear
        return kind(peak, total, round(section.warmup_epochs * steps_per_epoch), peak * section.final_factor)
    if isinstance(section, schedules.OneCycle):
        rising = max(1, round(section.warmup_fraction * total))
        return OneCycle(peak, total, rising, peak * section.start_factor, peak * section.final_factor)
    patience = Patience(section.metric, section.patience, section.min_delta)
    return Plateau(peak, section.factor, patience, section.cooldown, section.max_drops, section.restore_best_on_drop)


def build_early_stopping(section: schedules.EarlyStopping | None) -> EarlyStopping | None:
    """Build the early-stopping rule of the config's section, if there is one."""
    if section is None:
        return None
    return EarlyStopping(Patience(section.metric, section.patience, section.min_delta))
