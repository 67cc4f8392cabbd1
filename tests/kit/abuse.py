"""Calls commands inside the test's process, which is fast, and checks how they respond to bad input."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loguru import logger


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` is the exit code that its process would have."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that report errors: printed before torch is imported, logged after that."""
        return [line for line in self.err.splitlines() if line.startswith("error: ") or " ERROR " in line]


def call(module: str, *arguments: object, **environment: str) -> Outcome:
    """Run `python -m distributed.MODULE ARGUMENTS`, or `launch.MODULE`. Fails the test if it raises."""
    found = importlib.import_module(module if module.startswith("launch.") else f"distributed.{module}")
    main = importlib.import_module(f"{found.__name__}.__main__" if hasattr(found, "__path__") else found.__name__).main
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, dict(os.environ))
    sys.argv = [module, *map(str, arguments)]
    os.environ.update(environment)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main()
    except SystemExit as exit:  # raised by argparse
        code = exit.code
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
        logger.remove()
    return Outcome(int(code), out.getvalue(), err.getvalue())


def assert_outcome(found: Outcome, *parts: str, code: int = 2, lines: int = 1) -> None:
    """Check the exit code, the number of error lines, that each part is in one of them, and that there is no traceback."""
    output = found.out + found.err
    assert "Traceback" not in output, output
    assert (found.code, len(found.errors)) == (code, lines), output
    missing = [part for part in parts if not any(part in line for line in found.errors)]
    assert not missing, f"{missing} not in:\n{output}"
    assert all(len(line) < 900 for line in found.errors), output


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Check that every file, link and folder in these folders is unchanged: small files by content, large ones by time."""
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
            status = path.stat()
            found[str(path)] = f"{status.st_mode} {f'{status.st_size} {status.st_mtime_ns}' if path.is_file() else ''}"
    return found
