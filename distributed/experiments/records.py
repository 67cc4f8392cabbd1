"""The file of all results, one record per run. A write keeps the records of other runs and machines. Imports no torch."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from distributed.errors import InputError
from distributed.experiments.catalogue import CATALOGUE
from distributed.experiments.result import Result
from distributed.files import read_at_most, replace_text
from distributed.process.output_file import check_writable

_MAX_BYTES = 2**26
_RECORDS = TypeAdapter(list[Result])
_POINT = re.compile(r'\{\s+("epoch": [^{}]*?)\s+\}')


def merged(earlier: Sequence[Result], newer: Iterable[Result]) -> list[Result]:
    """Return all records in the order of the catalogue; those of experiments that it no longer has come last.

    A record is replaced only by one of the same key with at least as much progress, or by a complete one if the catalogue now
    plans another number of epochs.
    """
    records = {record.key: record for record in earlier}
    for result in newer:
        old = records.get(result.key)
        is_replanned = old is not None and result.is_complete and result.of_epochs != old.of_epochs
        if old is None or is_replanned or result.progress >= old.progress:
            records[result.key] = result
    places = {name: place for place, name in enumerate(CATALOGUE)}
    return [records[key] for key in sorted(records, key=lambda key: (places.get(key[0], len(places)), key))]


def write_results(newer: Iterable[Result], file: Path) -> list[Result]:
    """Merge records into a file, and return all of them.

    Raises:
        InputError: the file holds something else.
    """
    records = merged(read_results(file), newer)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([record.model_dump(mode="json") for record in records], indent=1)
    # A point of a curve takes one line.
    replace_text(file, _POINT.sub(lambda point: f"{{{' '.join(point[1].split())}}}", text) + "\n")
    return records


def read_results(file: Path) -> list[Result]:
    """Read the records of a file; none if it does not exist.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    if not file.exists():
        return []
    try:
        return _RECORDS.validate_json(read_at_most(file, _MAX_BYTES))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; fix its permissions, or choose another --out") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"{file}: not a list of results ({place + ': ' if place else ''}{problem['msg']}); move it away, or choose "
            "another --out"
        ) from None


def check_results(file: Path) -> None:
    """Raise InputError if the file cannot be written, or holds something else."""
    if file.suffix != ".json":
        raise InputError(f"--out {file}: should end in .json, e.g. {file.name or 'results'}.json")
    check_writable("--out", file, regular=True)
    read_results(file)
