"""A TensorBoard event file of scalars, written by the calling thread so that errors can be caught.

torch's SummaryWriter writes in its own thread. On a full disk that thread prints a traceback, and every later call raises.
"""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed.host.identity import host


class EventFile:
    """A new event file in `folder`. TensorBoard hides the contents of earlier files from `purge_step` on."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{_next_second(folder):010}.{host()}.{os.getpid()}.{time.monotonic_ns()}"
        # Unbuffered: after a failed write Python would retry the buffer when it is freed and print the error.
        self._file = (folder / name).open("xb", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of one step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        named = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=named)))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self).write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        """Write the complete record. On an almost full disk one system call may write only some of it."""
        rest = memoryview(record)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


def _next_second(folder: Path) -> int:
    """Return the time in seconds, or a second after that of the newest file: TensorBoard reads them sorted by name.

    The clock may be behind, e.g. after a restart on another node.
    """
    found = (re.match(r"events\.out\.tfevents\.(\d{10})\.", path.name) for path in folder.iterdir())
    return max([int(time.time()), *(int(match[1]) + 1 for match in found if match)])
