"""Commands called within the test's process, which is fast, and what must hold however wrong their input is."""

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` is what the process would end with."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What it said was wrong, before torch or after."""
        return [line for line in self.err.splitlines() if line.startswith("error: ") or " ERROR " in line]


def call(module: str, *words: object, **environment: str) -> Outcome:
    """`python -m distributed.MODULE WORDS`, or `launch.MODULE`; a test fails where that raises anything or hangs."""
    found = importlib.import_module(module if module.startswith("launch.") else f"distributed.{module}")
    main = importlib.import_module(f"{found.__name__}.__main__" if hasattr(found, "__path__") else found.__name__).main
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, dict(os.environ))
    sys.argv = [module, *map(str, words)]
    os.environ.update(environment)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _at_most(SECONDS):
            code = main()
    except SystemExit as ending:  # of argparse
        code = ending.code
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
        logger.remove()
    return Outcome(int(code), out.getvalue(), err.getvalue())


def assert_told(found: Outcome, *parts: str, code: int = 2, lines: int = 1) -> None:
    """It ended with that code and so many lines, each part in one of them, and without a traceback."""
    said = found.out + found.err
    assert "Traceback" not in said, said
    assert (found.code, len(found.errors)) == (code, lines), said
    missing = [part for part in parts if not any(part in line for line in found.errors)]
    assert not missing, f"{missing} not in:\n{said}"
    assert all(len(line) < 900 for line in found.errors), said


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Every file, link and folder in there is as it was before, to the byte."""
    before = [_content(folder) for folder in folders]
    yield
    assert [_content(folder) for folder in folders] == before


def _content(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file() and path.stat().st_size < 2**23:
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = f"{path.lstat().st_mode} {path.stat().st_size if path.is_file() else ''}"
    return found


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"still there after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
