"""The table of results, OUT.md and OUT.json: rows of runs on other machines are kept. Imports no torch."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distributed.errors import InputError
from distributed.experiments.results import REFERENCES, Result
from distributed.files import check_writable, read_json, replace_json, replace_text


def format_table(results: Sequence[Result]) -> str:
    """Return a Markdown table with a row per reference result, next to ours."""
    rows = [
        "| id | model, data | epochs | validation | test | reference (validation, test) | minutes | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {result.name: result for result in results}
    for name, reference in REFERENCES.items():
        reported = f"{_per_cent(reference.validation)}, {_per_cent(reference.test)}"
        if name not in found:
            rows.append(f"| {name} | | not yet run | | | {reported} | | |")
            continue
        r = found[name]
        epochs = f"{r.epochs}" if r.epochs == r.of_epochs else f"{r.epochs} of {r.of_epochs}"
        epochs += ", ended early" if r.ended_early else ""
        best = f" at epoch {r.at_epoch}" if r.validation is not None else ""
        processes = f"{r.processes} process{'' if r.processes == '1' else 'es'}"
        mode = f"exact ({r.exact_shards})" if r.exact_shards else "fast"
        rows.append(
            f"| {r.name} | {r.model}, {r.data} | {epochs} | {_per_cent(r.validation)}{best} | {_per_cent(r.test)} | "
            f"{reported} | {r.minutes:.1f} | {r.device.split(' with')[0]}, {processes}, {r.precision}, {mode} |"
        )
    return "\n".join(rows) + "\n"


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def merge(results: Sequence[Result], out: Path) -> list[Result]:
    """Return the rows of OUT.json with these results merged in, in the references' order.

    A row is replaced only by a run of the same id with at least as much progress.

    Raises:
        InputError: OUT.json is not such a table.
    """
    rows = {row.name: row for row in read_table(out.with_suffix(".json"))}
    for result in results:
        if result.name not in rows or result.progress >= rows[result.name].progress:
            rows[result.name] = result
    return [rows[name] for name in REFERENCES if name in rows]


def write_table(results: Sequence[Result], out: Path) -> list[Result]:
    """Merge results into OUT.md and OUT.json; return the merged rows. Raises InputError as `merge` does."""
    rows = merge(results, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out.with_suffix(".md"), format_table(rows))
    replace_json(out.with_suffix(".json"), [asdict(result) for result in rows])
    return rows


def check_table(out: Path) -> None:
    """Raise InputError if OUT.md and OUT.json cannot be written, or OUT.json is not such a table."""
    if not out.name or (os.path.exists(out) and not os.path.isfile(out) and not os.path.isdir(out)):
        raise InputError(f"--out {out}: should be the table's name without .md or .json, in an existing or new folder")
    for suffix in (".md", ".json"):
        check_writable("--out", out.with_suffix(suffix), regular=True)
    read_table(out.with_suffix(".json"))


def read_table(file: Path) -> list[Result]:
    """Read the rows of an OUT.json; none if the file does not exist.

    Raises:
        InputError: the file is not such a table.
    """
    if not file.exists():
        return []
    try:
        return [Result(**row) for row in read_json(file)]
    except TypeError:
        raise InputError(f"{file}: not a table of experiments; move it away, or choose another --out") from None
