"""The seeds' results beside ours: read from run folders, merged into a table. Imports no torch."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distributed.config import from_command_line
from distributed.errors import InputError
from distributed.files import check_writable, read_json, replace_json, replace_text
from distributed.host.shipped import shipped
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import SplitRecord, read_epochs
from distributed.run.records import read_attempts

CONFIGS = shipped("configs/seeds")


@dataclass(frozen=True)
class Seed:
    """What the seed documents report, in per cent."""

    test: float
    validation: float | None = None


SEEDS = {
    "I-10": Seed(79.46),
    "I-50": Seed(85.87),
    "A-10": Seed(68.80),
    "S1-10": Seed(78.7, 78.7),
    "S1-100": Seed(42.5, 41.3),
    "S2-10": Seed(75.4, 75.2),
    "S2-100": Seed(35.7, 35.4),
    "S3-10": Seed(79.6, 78.6),
}


@dataclass(frozen=True)
class Result:
    """How far a run came and what it reached, at its best epoch by validation where it has validation, else at its last."""

    name: str
    model: str
    data: str
    epochs: int
    of_epochs: int
    ended_early: bool
    at_epoch: int
    train: float
    validation: float | None
    test: float | None
    test_loss: float | None
    minutes: float
    attempts: int
    processes: str
    device: str
    precision: str
    exact_shards: int
    versions: dict[str, str]
    date: str
    command: str

    @property
    def progress(self) -> int:
        """Epochs, to be compared with another run of the same id; all of them where early stopping ended it."""
        return self.of_epochs if self.ended_early else self.epochs


def result_of(name: str, run: RunFolder) -> Result | None:
    """None where the run has finished no epoch yet."""
    config = run.saved_config()
    epochs = read_epochs(run.metrics_file)
    if config is None or not epochs:
        return None
    best = [line for line in epochs if line.is_best] if config.best_by else []
    line = (best or epochs)[-1]
    starts = [entry for entry in read_attempts(run.attempts_file) if entry.event == "started"]
    recipe = from_command_line([str(CONFIGS / f"{name}.toml")]).config
    finished = run.status().status == "finished"
    bits = starts[-1].bits or {}
    worlds = sorted({entry.world_size or 1 for entry in starts})
    return Result(
        name=name, model=config.model.name, data=config.data.name, epochs=len(epochs), of_epochs=recipe.epochs,
        ended_early=finished and len(epochs) < config.epochs, at_epoch=line.epoch + 1, train=100 * (line.train_accuracy or 0.0),
        validation=_accuracy(line.validation),
        test=_accuracy(line.test), test_loss=line.test.loss if line.test else None,
        minutes=sum(entry.seconds or 0.0 for entry in epochs) / 60, attempts=len(starts),
        processes=" then ".join(map(str, worlds)), device=bits["device"], precision=config.precision,
        exact_shards=bits["shards"], versions=bits["versions"], date=(starts[-1].time or "")[:10],
        command=f"python -m distributed.experiments --only {name}",
    )  # fmt: skip


def _accuracy(measured: SplitRecord | None) -> float | None:
    return None if measured is None or measured.accuracy is None else 100 * measured.accuracy


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each of the seeds' results, theirs beside ours."""
    rows = [
        "| id | model, data | epochs | validation | test | the seed's (validation, test) | minutes | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {r.name: r for r in results}
    for name, seed in SEEDS.items():
        if name not in found:
            rows.append(f"| {name} | | not yet run | | | {_per_cent(seed.validation)}, {_per_cent(seed.test)} | | |")
            continue
        r = found[name]
        extent = f"{r.epochs}" if r.epochs == r.of_epochs else f"{r.epochs} of {r.of_epochs}"
        extent += ", ended early" if r.ended_early else ""
        at = f" at epoch {r.at_epoch}" if r.validation is not None else ""
        mode = f"exact ({r.exact_shards})" if r.exact_shards else "fast"
        rows.append(
            f"| {r.name} | {r.model}, {r.data} | {extent} | {_per_cent(r.validation)}{at} | {_per_cent(r.test)} | "
            f"{_per_cent(seed.validation)}, {_per_cent(seed.test)} | {r.minutes:.1f} | {r.device.split(' with')[0]}, "
            f"{r.processes} processes, {r.precision}, {mode} |"
        )
    return "\n".join(rows) + "\n"


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def write_results(runs: Path, out: Path) -> list[Result]:
    """Merge all runs that there are into OUT.md and OUT.json; the merged rows."""
    return write_table(results_in(runs), out)


def results_in(runs: Path) -> list[Result]:
    """How far each run in this folder has come."""
    return [found for name in SEEDS if (found := result_of(name, RunFolder(runs / name)))]


def write_table(results: Sequence[Result], out: Path) -> list[Result]:
    """Merge results into OUT.md and OUT.json; the merged rows."""
    rows = merged(results, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out.with_suffix(".md"), table(rows))
    replace_json(out.with_suffix(".json"), [asdict(result) for result in rows])
    return rows


def merged(results: Sequence[Result], out: Path) -> list[Result]:
    """The rows of OUT.json with these results, in the seeds' order.

    A row that is there is replaced only by a run of the same id that came at least as far.
    """
    rows = {row.name: row for row in read_table(out.with_suffix(".json"))}
    for result in results:
        if result.name not in rows or result.progress >= rows[result.name].progress:
            rows[result.name] = result
    return [rows[name] for name in SEEDS if name in rows]


def check_table(out: Path) -> None:
    """Raises InputError if OUT.md and OUT.json cannot be written."""
    if not out.name or (os.path.exists(out) and not os.path.isfile(out) and not os.path.isdir(out)):
        raise InputError(f"--out {out}: names the table without .md and .json; choose a name in a folder")
    for suffix in (".md", ".json"):
        check_writable("--out", out.with_suffix(suffix), regular=True)


def read_table(file: Path) -> list[Result]:
    """The rows of an OUT.json; none where there is no such file.

    Raises:
        InputError: it holds anything else.
    """
    if not file.exists():
        return []
    try:
        return [Result(**row) for row in read_json(file)]
    except TypeError:
        raise InputError(f"{file}: not a table of experiments; move it away, or choose another --out") from None
