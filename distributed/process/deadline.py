"""Calls with a time limit, for operations that cannot be interrupted. Imports no torch."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def call_within(seconds: float, work: Callable[[], T]) -> T:
    """Return the result of `work`, or raise the exception it raises.

    `work` runs on a daemon thread. After a timeout the thread is abandoned; it does not keep the process alive.

    Raises:
        TimeoutError: it took longer.
    """
    results: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no result within {seconds:g} s")
    return results[0]


def try_within(seconds: float, work: Callable[[], T]) -> T | None:
    """Like `call_within`, but return None if `work` fails or takes longer."""
    with suppress(Exception):
        return call_within(seconds, work)
    return None
