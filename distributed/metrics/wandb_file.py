"""Reads what wandb recorded of a run in its folder: log files of LevelDB's format with records of wandb's protocol.

wandb writes in blocks, so a killed attempt may have logged more than its file has.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed.files import opened
from distributed.metrics.follower import Logged

_HEADER_BYTES, _BLOCK_BYTES = 7, 32768
_FULL, _LAST = 1, 4  # types of a piece that ends a record


def logged_in(folder: Path, run_id: str) -> Logged:
    """Return the last step and the number of epochs in a run's files; an unreadable file counts as empty."""
    step = epochs = 0
    for file in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        with suppress(Exception):  # of another version of wandb: what it has is logged again
            for values in rows_in(file):
                step = max(step, int(values["_step"])) if "train/lr" in values else step
                epochs = max(epochs, int(values.get("epoch", 0)))
    return Logged(step, epochs)


def rows_in(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the logged values of each step, by name, with `_step`."""
    for record in records_in(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def records_in(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file, up to an incomplete one."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # its classes are made at import
    with opened(file) as stream:
        data = stream.read()
    position, parts = _HEADER_BYTES, b""
    while position + _HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER_BYTES:  # padding at the end of a block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start = position + _HEADER_BYTES
        piece = data[start : start + length]
        if not kind or len(piece) < length:
            return
        parts, position = parts + piece, start + length
        if kind in (_FULL, _LAST):
            record = protocol.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
