"""The lines that a run writes, for those who read them later; a line that is not whole is passed over. Imports no torch."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from distributed.errors import InputError
from distributed.files import lines_of

Line = dict[str, Any]
_TIME = "%Y-%m-%dT%H:%M:%S%z"


def metrics_lines(file: Path) -> list[Line]:
    """Of metrics.jsonl: steps and epochs."""
    return _whole(file, lambda line: line["kind"] in ("train", "epoch") and _are(int, line["step"], line["epoch"]))


def save_lines(file: Path) -> list[Line]:
    """Of digests.jsonl."""
    return _whole(file, lambda line: line["name"].split("-")[1].isdecimal() and _are(dict, line["tensors"]))


def attempt_lines(file: Path) -> list[Line]:
    """Of attempts.jsonl."""

    def is_whole(line: Line) -> bool:
        if "time" in line:
            time_of(line)
        images = line.get("images", {})
        return (
            _are(str, line["event"])
            and _are(dict, bits := line.get("bits", {}), line.get("versions", {}), *images.values())
            and _are(dict, bits.get("versions", {}))
            and _are(int, line.get("step") or 0, line.get("world_size", 1))
        )

    return _whole(file, is_whole)


def time_of(line: Line) -> datetime:
    """When an attempt's line was written."""
    return datetime.strptime(line["time"], _TIME)


def _are(kind: type, *values: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _whole(file: Path, is_whole: Callable[[Line], bool]) -> list[Line]:
    """The last line of a killed run may be half there; others may have been damaged since."""
    found = []
    try:
        texts = list(lines_of(file))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; fix its permissions, or name another run") from None
    for text in texts:
        try:
            line = json.loads(text)
            if is_whole(line):
                found.append(line)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            continue
    return found
