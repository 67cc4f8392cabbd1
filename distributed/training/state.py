"""The state of a run: its counters, schedule and the totals of the current epoch. Saved as JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from distributed.errors import NotFiniteError
from distributed.optim.schedules import EarlyStopping, Metric, Schedule
from distributed.training.totals import Totals

_SKIPPED_AT_MOST = 100
"""Steps in a row that float16 may skip: after 40 the loss scale is at its minimum."""


@dataclass
class Best:
    """The best validation epoch so far."""

    epoch: int
    step: int
    value: float


class Observed(NamedTuple):
    """The outcome of an epoch's validation."""

    is_best: bool
    decisions: list[str]
    """One log line per decision of the schedule and of early stopping."""


@dataclass
class TrainState:
    """Everything except tensors that a run needs to resume exactly."""

    schedule: Schedule
    early_stopping: EarlyStopping | None = None
    precision: str = "float32"
    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    samples_seen: int = 0
    best: Best | None = None
    window: Totals = field(default_factory=Totals)
    """Training totals since the last logging step."""
    epoch_totals: Totals = field(default_factory=Totals)
    """Training totals of the current epoch up to the last logging step."""
    stop_reason: str | None = None
    """Why this attempt stopped before the end of the run. Not saved, because the next attempt starts without one."""
    _read_at: int = field(default=0, compare=False)
    """The step at which totals were last added."""
    _skipped_in_a_row: int = field(default=0, compare=False)

    def finish_step(self, samples: int) -> None:
        self.step += 1
        self.step_in_epoch += 1
        self.samples_seen += samples

    def add(self, totals: Totals) -> None:
        """Add totals read from the device to the window. Called before every save, so no checkpoint has a bad step.

        Raises:
            NotFiniteError: one of the losses was infinite or NaN; or, except in float16, which skips such steps, a gradient.
        """
        float32 = "" if self.precision in ("float32", "float64") else ", or precision = float32"
        anew = "in a new run, which may start from this one's weights with init_from"
        if totals.first_bad_step is not None:
            raise NotFiniteError(
                f"the loss was not finite at step {totals.first_bad_step + 1}: "  # counted from 1, as in the log
                f"set a lower optim.lr, or optim.max_grad_norm{float32}, {anew}; no checkpoint includes this step"
            )
        if totals.skipped_steps and self.precision != "float16":
            raise NotFiniteError(
                f"the loss was finite but a gradient was not, in the steps up to {self.step}: set a lower optim.lr{float32}, "
                f"{anew}; a square root, norm or division at 0 in the network or the loss can also cause this; no checkpoint "
                "includes that step"
            )
        steps, self._read_at = self.step - self._read_at, self.step
        self._skipped_in_a_row = self._skipped_in_a_row + steps if totals.skipped_steps == steps else 0
        if self._skipped_in_a_row > _SKIPPED_AT_MOST:
            raise NotFiniteError(
                f"precision = float16: no gradient was finite in the last {self._skipped_in_a_row} steps, at any loss scale: "
                f"set precision = float32 {anew}; a square root, norm or division at 0 in the network or the loss can also "
                "cause this"
            )
        self.window += totals

    def pop_window(self) -> Totals:
        """Return the totals since the last logging step and move them into the epoch's."""
        window, self.window = self.window, Totals()
        self.epoch_totals += window
        return window

    def observe(self, validation: Totals | None, *, best_by: Metric | None) -> Observed:
        """Update the best epoch, the schedule and early stopping from an epoch's validation totals."""
        if validation is None:
            return Observed(is_best=False, decisions=[])
        metrics: dict[Metric, float] = {"accuracy": validation.accuracy, "loss": validation.mean_loss}
        is_best = best_by is not None and self._update_best(best_by, metrics[best_by])
        decisions = [self.schedule.observe(metrics), self.early_stopping and self.early_stopping.observe(metrics)]
        return Observed(is_best, [decision for decision in decisions if decision])

    def _update_best(self, metric: Metric, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best and (value <= self.best.value if metric == "accuracy" else value >= self.best.value):
            return False
        self.best = Best(self.epoch, self.step, value)
        return True

    def finish_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0
        self.epoch_totals = Totals()

    @property
    def stopped_early(self) -> bool:
        return bool(self.early_stopping and self.early_stopping.stopped)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "step_in_epoch": self.step_in_epoch,
            "samples_seen": self.samples_seen,
            "best": self.best and asdict(self.best),
            "window": asdict(self.window),
            "epoch_totals": asdict(self.epoch_totals),
            "schedule": self.schedule.state_dict(),
            "early_stopping": self.early_stopping and self.early_stopping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self._read_at = self.step
        self.step_in_epoch, self.samples_seen = state["step_in_epoch"], state["samples_seen"]
        self.best = state["best"] and Best(**state["best"])
        self.window, self.epoch_totals = Totals(**state["window"]), Totals(**state["epoch_totals"])
        self.schedule.load_state_dict(state["schedule"])
        if self.early_stopping and state["early_stopping"]:
            self.early_stopping.load_state_dict(state["early_stopping"])
