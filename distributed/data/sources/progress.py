"""How far a long wait has come: a bar on a terminal, else a line now and then. Imports no torch."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LINE_EVERY_SECONDS = 10.0


@contextmanager
def progress(what: str, total: int | None, *, unit: str, start: int = 0) -> Iterator[Callable[[int], None]]:
    """A context whose value is called with how much was done since; `unit` is `B` for bytes, else a word."""
    if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=start, desc=what, unit=unit, unit_scale=unit == "B", file=sys.stderr) as bar:

            def move(count: int) -> None:
                bar.update(count)

            yield move
        return
    done, began = start, time.monotonic()
    told = began

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if (now := time.monotonic()) - told >= LINE_EVERY_SECONDS:
            told = now
            _say(line(what, done, total, unit, (done - start) / (now - began)))

    _say(f"{what}: {_amount(total, unit) if total else 'size not known'}")
    yield advance
    seconds = time.monotonic() - began
    _say(f"{what}: {_amount(done, unit)} after {seconds:.0f} s")


def _say(text: str) -> None:
    """Print to stderr; a closed stream is ignored."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)


def line(what: str, done: int, total: int | None, unit: str, per_second: float) -> str:
    """`what: 34.1 of 170.1 MB, 55 kB/s, 41 min left`."""
    rate = f"{_amount(per_second, unit)}/s"
    if not total:
        return f"{what}: {_amount(done, unit)}, {rate}"
    left = (total - done) / per_second if per_second else float("inf")
    ends = "stalled" if left == float("inf") else f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
    return f"{what}: {_amount(done, unit)} of {_amount(total, unit)}, {rate}, {ends}"


def _amount(count: float, unit: str) -> str:
    if unit != "B":
        return f"{count:,.0f} {unit}"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
