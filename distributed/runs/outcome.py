"""Reads the status and results of a run folder, however damaged its files are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distributed.config.toml_file import from_file
from distributed.errors import InputError
from distributed.run.folder import RunFolder
from distributed.run.lock_holder import SlurmQueries, why_ended
from distributed.run.metrics_log import MAX_EPOCHS, MetricsLog, Point
from distributed.run.records import Holder, Status

_MARKS = {"status.json", "attempts.jsonl", "config.toml"}  # a folder with one of these files is a run
_INNER = {"checkpoints", "tensorboard", "logs", "profile", "export", "ray", "slurm"}  # a run's own subfolders


@dataclass(frozen=True)
class Outcome:
    """Status and results of a run; None for anything that its folder does not record.

    `best` is the highest validation accuracy, `test` the newest test accuracy, `further` the newest measurement on the test
    split of each metric of `evaluation.metrics`.
    """

    status: str
    epochs: int
    of_epochs: int | None
    best: Point | None
    test: Point | None
    when: str
    minutes: float
    further: Mapping[str, Point] = field(default_factory=dict)

    @property
    def progress(self) -> str:
        """Format finished and planned epochs, e.g. `3 of 10`."""
        return f"{self.epochs} of {'?' if self.of_epochs is None else self.of_epochs}"


def runs_below(folder: Path) -> list[Path]:
    """Return every run folder at or below `folder`, in natural order: `seed-2` before `seed-10`."""
    found, links = list[Path](), list[Path]()
    for path, inner, files in os.walk(folder):
        is_run = bool(_MARKS & set(files))
        if is_run:
            found.append(Path(path))
        inner[:] = [name for name in inner if not name.startswith(".") and not (is_run and name in _INNER)]
        if not is_run:  # links are not followed, but may be runs elsewhere, e.g. on another disk
            links += [link for name in inner if _is_linked_run(link := Path(path, name))]
    listed = {os.path.realpath(run) for run in found}
    for link in sorted(links, key=_natural_order):
        if (target := os.path.realpath(link)) not in listed:
            listed.add(target)
            found.append(link)
    return sorted(found, key=_natural_order)


def _is_linked_run(path: Path) -> bool:
    return os.path.islink(path) and any(os.path.isfile(path / mark) for mark in _MARKS)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    parts = "".join(c if c.isdecimal() else f"\0{c}\0" for c in str(path)).split("\0")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts if part]


def outcome_of(run: Path, query_slurm: SlurmQueries | None = None) -> Outcome:
    """Read a run's outcome as far as possible; damaged files count as missing."""
    status = RunFolder(run).status()
    try:
        log = MetricsLog.read(RunFolder(run).metrics_file)
    except InputError:
        log = MetricsLog([], [])
    return Outcome(
        status=_status(status, run, query_slurm),
        epochs=log.finished_epochs,
        of_epochs=_planned_epochs(run),
        best=log.best("validation"),
        test=log.last("test"),
        when=_printable(status.time)[:16].replace("T", " "),
        minutes=log.minutes,
        further={name: point for name in log.further_metrics if (point := log.last("test", name))},
    )


def _status(status: Status, run: Path, query_slurm: SlurmQueries | None) -> str:
    """Return the status in status.json, or `interrupted` if it is `running` but its process is known to have ended."""
    recorded = _printable(status.status)
    return (
        "interrupted"
        if recorded == "running" and why_ended(Holder.read(run / "attempt.json"), query_slurm)
        else recorded or "unknown"
    )


def _planned_epochs(run: Path) -> int | None:
    try:
        epochs = from_file(run / "config.toml").values.get("epochs")
    except InputError:
        return None
    return epochs if type(epochs) is int and 0 < epochs < MAX_EPOCHS else None


def _printable(text: str | None) -> str:
    """Return `text` if it is short and fits on one line, otherwise an empty string."""
    return text if text and text.isprintable() and len(text) <= 40 else ""
