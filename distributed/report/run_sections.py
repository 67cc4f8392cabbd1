"""The sections of the page on one run. A section that cannot be created says why. Imports torch only on demand."""

from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.config import as_toml
from distributed.figures.curves import run_curves, speed_curve
from distributed.figures.style import as_svg
from distributed.inference.saved_run import choose_checkpoint
from distributed.report import checkpoint_sections
from distributed.report.history import History
from distributed.report.narrative import clock, describe, describe_end, describe_learning_rate, describe_status
from distributed.report.page import Absent, Html, folded, key_figures, section, section_or_reason, table, text
from distributed.run.checkpoint_layout import committed_names

if TYPE_CHECKING:
    from distributed.report.analysis import Analysis, Findings

_MISTAKES = 24


def run_sections(run: History, *, checkpoint: str, anchor: str) -> list[Html]:
    """Return all sections on a run.

    Args:
        checkpoint: name of the checkpoint to analyse.
        anchor: id by which the page links to this run.
    """
    saved = _Saved(run, checkpoint)
    sections: list[tuple[str, Callable[[], list[Html]]]] = [
        ("Learning curves", lambda: [curves_as_svg(run), text(*describe_learning_rate(run))]),
        ("Speed", lambda: [text(_speed(run)), speed_as_svg(run)]),
        ("Test results", lambda: checkpoint_sections.results(saved.findings(), saved.path().name)),
        ("Classes", lambda: checkpoint_sections.classes(saved.findings())),
        ("Most confident mistakes", lambda: checkpoint_sections.mistakes(saved.findings())),
        ("Augmented training images", lambda: checkpoint_sections.augmented(run.config, saved.analysis())),
        ("First-layer filters", lambda: checkpoint_sections.filters(saved.path())),
    ]
    return [
        f'<h2 id="{escape(anchor)}">{escape(run.name)}</h2>',
        text(describe(run)),
        key_figures(_key_figures(run)),
        _attempts(run),
        *(section_or_reason(title, make) for title, make in sections),
        section("Settings", folded("config.toml", as_toml(run.config))),
    ]


class _Saved:
    """A run's data and checkpoint, each read once for all sections."""

    def __init__(self, run: History, name: str) -> None:
        self.run, self.name = run, name
        self.analysis, self._outcome = cache(self._analysis), cache(self._findings)

    def path(self) -> Path:
        """Return the checkpoint's folder.

        Raises:
            Absent: the run has saved no checkpoint.
        """
        if not committed_names(self.run.folder.checkpoints):
            raise Absent("The run has not saved a checkpoint yet, so there are no weights to analyse.")
        return choose_checkpoint(self.run.folder.path, self.name)

    def _analysis(self) -> "Analysis":
        from distributed.report.analysis import Analysis

        return Analysis(self.run.folder, self.run.config)

    def findings(self) -> "Findings":
        """Return the evaluation of the checkpoint. It may take hours, so a failed one is not repeated."""
        outcome = self._outcome()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _findings(self) -> "Findings | Exception":
        try:
            return self.analysis().findings(self.path(), mistakes=_MISTAKES)
        except Exception as error:
            return error


def _key_figures(run: History) -> list[tuple[str, str]]:
    figures = []
    if best := run.log.best("validation"):
        figures.append((f"best validation accuracy, epoch {best.epoch}", f"{best.value:.2%}"))
    if test := run.log.last("test"):
        figures.append((f"test accuracy, epoch {test.epoch}", f"{test.value:.2%}"))
    for name in run.log.further_metrics:
        if point := run.log.last("test", name):
            figures.append((f"test {name}, epoch {point.epoch}", f"{point.value:.4f}"))
    time = run.wall_time
    figures.append(("epochs", f"{run.log.finished_epochs} of {run.config.epochs}"))
    figures.append(
        ("wall time" if time.complete else "wall time of the attempts whose end is recorded", clock(time.total))
    )
    return [*figures, ("status", run.status.status or "unknown")]


def _attempts(run: History) -> Html:
    rows = [
        [
            str(number),
            (attempt.started.time or "").replace("T", " ").replace("+0000", " UTC"),
            f"{attempt.started.step or 0:,}",
            attempt.hardware,
            clock(attempt.duration) if attempt.duration is not None else "unknown",
            describe_end(attempt, last=number == len(run.attempts)),
            attempt.started.git or "",
        ]
        for number, attempt in enumerate(run.attempts, 1)
    ]
    headings = ["", "started", "from step", "hardware", "duration", "end", "commit"]
    count = len(run.started_attempts)
    resumed = (
        f" It took {count} attempts; each resumed from the last checkpoint of the one before." if count > 1 else ""
    )
    versions = run.started_attempts[-1].started.versions or {} if run.started_attempts else {}
    return section(
        "Attempts",
        text(describe_status(run) + resumed),
        table(headings, rows, numbers=[2]),
        text("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", quiet=True)
        if versions
        else "",
    )


def curves_as_svg(run: History) -> Html:
    """Draw loss, accuracy and learning rate.

    Raises:
        Absent: no epoch has finished.
    """
    if not run.log.epochs:
        raise Absent("No epoch has finished yet, so there is nothing to draw.")
    with run_curves(run.to_draw) as figure:
        return as_svg(figure, label=f"loss, accuracy and learning rate of {run.name} over epochs")


def speed_as_svg(run: History) -> Html:
    """Draw images per second at each logging step."""
    restarts = [attempt.started.step or 0 for attempt in run.started_attempts[1:]]
    with speed_curve(run.log, restarts=restarts) as figure:
        return as_svg(figure, label=f"training speed of {run.name} over steps")


def _speed(run: History) -> str:
    """Describe the median speed and the median wait for data.

    Raises:
        Absent: no step was logged.
    """
    if not run.log.steps:
        raise Absent("No training step was logged, so the speed is unknown: lower logging.every_steps.")
    speeds = sorted(line.images_per_second or 0.0 for line in run.log.steps)
    waits = sorted(line.data_wait or 0.0 for line in run.log.steps)
    return (
        f"Median speed: {speeds[len(speeds) // 2]:,.0f} images/s over all processes, with {waits[len(waits) // 2]:.1%} of "
        "the time spent waiting for data."
    )
