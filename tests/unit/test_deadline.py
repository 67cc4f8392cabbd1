"""Calls with a time limit return, raise or time out."""

import threading
import time

import pytest

from distributed.process.deadline import call_within, try_within


def test_result_is_returned():
    assert call_within(5, lambda: 7) == try_within(5, lambda: 7) == 7


def test_exception_is_raised_or_suppressed():
    def fail() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        call_within(5, fail)
    assert try_within(5, fail) is None


def test_slow_call_is_abandoned():
    release = threading.Event()
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no result within 0\.05 s"):
        call_within(0.05, release.wait)
    assert try_within(0.05, release.wait) is None
    assert time.monotonic() - begin < 2
    release.set()
