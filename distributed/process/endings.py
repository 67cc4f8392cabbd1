"""Ends the process at once from any thread, and hands torchrun the reason that it prints last. Imports no torch."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, NoReturn

from distributed.errors import ExitCode
from distributed.topology import error_file, has_launcher, is_first_on_node

_LIMIT_SECONDS = 3.0  # a run folder, store or terminal that does not answer must not keep the process


class Ending(NamedTuple):
    """Why the process ends, in words, and with which exit code."""

    code: ExitCode
    reason: str
    is_alone: bool = False
    """Whether the other ranks should not end because of it: they notice that this one is gone, and finish what they save."""

    @property
    def is_stop(self) -> bool:
        """Whether somebody asked for it; everything else is a failure."""
        return self.code in (ExitCode.STOPPED, ExitCode.INTERRUPTED)


LastWord = Callable[[Ending], Ending | None]
_last_words: list[LastWord] = []
_leaving = threading.Lock()


def add_last_word(word: LastWord, *, first: bool = False) -> None:
    """Call this before the process ends at once; it may return another ending, which then holds.

    It runs on a thread of its own, and is not waited for if it takes long.
    """
    _last_words.insert(0 if first else len(_last_words), word)


def remove_last_word(word: LastWord) -> None:
    _last_words.remove(word)


def leave(code: ExitCode, reason: str, *, is_alone: bool = False) -> NoReturn:
    """End the process now, whatever its other threads are waiting for."""
    _leaving.acquire()  # for good: a second thread that wants to leave waits here for the first
    ending = Ending(code, reason, is_alone)

    def settle() -> None:
        nonlocal ending
        for word in list(_last_words):
            with suppress(Exception):
                ending = word(ending) or ending

    def speak() -> None:
        report(ending.reason, is_cause=False)
        with suppress(OSError, ValueError, AttributeError):  # the terminal may be gone
            if not ending.is_stop or is_first_on_node() or not has_launcher():
                print(f"{'' if ending.is_stop else 'error: '}{ending.reason}", file=sys.stderr, flush=True)
            sys.stdout.flush()

    for work, seconds in ((settle, _LIMIT_SECONDS), (speak, _LIMIT_SECONDS / 3)):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
    os._exit(ending.code)


def report(reason: str, *, is_cause: bool) -> None:
    """Write why this rank ends to the file from which torchrun prints its summary, if there is a torchrun.

    Args:
        is_cause: whether this rank failed by itself, not because of a signal or of another rank.
    """
    path = error_file()
    if path is None:
        return
    # In full seconds, and torchrun takes the earliest for the root cause.
    timestamp = int(time.time()) + (not is_cause)
    message = {"message": reason, "extraInfo": {"timestamp": str(timestamp)}}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"message": message}), encoding="utf-8")
