"""Shows the progress of a long operation: a bar on a terminal, else a line every few seconds. Imports no torch."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LINE_EVERY_SECONDS = 10.0


@contextmanager
def progress(task: str, total: int | None, *, unit: str, start: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the amount done since the last call.

    Args:
        unit: `B` for bytes, else a plural noun.
        start: amount done before.
    """
    if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=start, desc=task, unit=unit, unit_scale=unit == "B", file=sys.stderr) as bar:

            def move(count: int) -> None:
                bar.update(count)

            yield move
        return
    done, began = start, time.monotonic()
    printed = began

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if (now := time.monotonic()) - printed >= LINE_EVERY_SECONDS:
            printed = now
            _print(line(task, done, total, unit, (done - start) / (now - began)))

    _print(f"{task}: {_amount(total, unit) if total else 'unknown size'}")
    yield advance
    seconds = time.monotonic() - began
    _print(f"{task}: {_amount(done, unit)} after {seconds:.0f} s")


def _print(text: str) -> None:
    """Print to stderr; a closed stream is ignored."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)


def line(task: str, done: int, total: int | None, unit: str, per_second: float) -> str:
    """Return `task: 34.1 of 170.1 MB, 55 kB/s, 41 min left`."""
    rate = f"{_amount(per_second, unit)}/s"
    if not total:
        return f"{task}: {_amount(done, unit)}, {rate}"
    left = (total - done) / per_second if per_second else float("inf")
    estimate = (
        "stalled" if left == float("inf") else f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
    )
    return f"{task}: {_amount(done, unit)} of {_amount(total, unit)}, {rate}, {estimate}"


def _amount(count: float, unit: str) -> str:
    if unit != "B":
        return f"{count:,.0f} {unit}"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
