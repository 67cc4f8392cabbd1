"""Where a run stands: its counters, schedule and the sums of the epoch so far. JSON in and out."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from distributed.errors import NotFiniteError
from distributed.optim.schedules import EarlyStopping, Metric, Schedule
from distributed.training.totals import Totals


@dataclass
class Best:
    """The best validation epoch so far."""

    epoch: int
    step: int
    value: float


@dataclass
class TrainState:
    """All that a run must know besides tensors to go on as if nothing had happened."""

    schedule: Schedule
    early_stopping: EarlyStopping | None = None
    precision: str = "float32"
    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    samples_seen: int = 0
    best: Best | None = None
    window: Totals = field(default_factory=Totals)
    """Training sums since the last logging step."""
    epoch_totals: Totals = field(default_factory=Totals)
    """Training sums of the epoch up to the last logging step."""
    stop_reason: str | None = None
    """Why this attempt ended before the run did. Not saved: the next attempt has its own fate."""

    def step_done(self, samples: int) -> None:
        self.step += 1
        self.step_in_epoch += 1
        self.samples_seen += samples

    def take(self, totals: Totals) -> None:
        """Add sums read from the device to the window.

        Raises:
            NotFiniteError: a loss among them was infinite or no number. So no checkpoint can be made of such weights.
        """
        if totals.first_bad_step is not None:
            wider = "" if self.precision in ("float32", "float64") else ", or use precision = float32"
            raise NotFiniteError(
                f"the loss was not finite at step {totals.first_bad_step + 1}: "  # counted from 1, as in the log
                f"lower optim.lr, or set optim.max_grad_norm{wider}; no checkpoint holds it"
            )
        self.window += totals

    def close_window(self) -> Totals:
        """The sums since the last logging step, which go into the epoch's."""
        window, self.window = self.window, Totals()
        self.epoch_totals += window
        return window

    def observe(self, validation: Totals | None, *, best_by: Metric | None) -> tuple[bool, list[str]]:
        """Take an epoch's validation: whether it is the best so far, and what schedule and early stopping decided."""
        if validation is None:
            return False, []
        metrics: dict[Metric, float] = {"accuracy": validation.accuracy, "loss": validation.mean_loss}
        is_best = bool(best_by) and self._is_best(best_by, metrics)
        decisions = [self.schedule.observe(metrics), self.early_stopping and self.early_stopping.observe(metrics)]
        return is_best, [decision for decision in decisions if decision]

    def _is_best(self, best_by: Metric | None, metrics: dict[Metric, float]) -> bool:
        assert best_by is not None
        value = metrics[best_by]
        if math.isnan(value):
            return False
        if self.best and (value <= self.best.value if best_by == "accuracy" else value >= self.best.value):
            return False
        self.best = Best(self.epoch, self.step, value)
        return True

    def epoch_done(self) -> None:
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
        self.step_in_epoch, self.samples_seen = state["step_in_epoch"], state["samples_seen"]
        self.best = state["best"] and Best(**state["best"])
        self.window, self.epoch_totals = Totals(**state["window"]), Totals(**state["epoch_totals"])
        self.schedule.load_state_dict(state["schedule"])
        if self.early_stopping and state["early_stopping"]:
            self.early_stopping.load_state_dict(state["early_stopping"])
