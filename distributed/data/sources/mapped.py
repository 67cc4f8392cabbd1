"""Arrays that are mapped from files and may be larger than memory. Imports no torch."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PAGE = mmap.PAGESIZE

ReadAhead = Callable[[NDArray[np.int64]], None]
"""Starts to read rows, without waiting for them."""


class Mapped(NamedTuple):
    """A read-only array, and the function to call before its rows are read; None if the system should decide alone."""

    array: NDArray[Any]
    read_ahead: ReadAhead | None


def map_rows(file: Path, start: int, dtype: np.dtype[Any], shape: tuple[int, ...], *, as_rows: bool) -> Mapped:
    """Map the array that begins at byte `start` of a file.

    Args:
        as_rows: rows will be read in random order and the array may not fit into memory. Around each missing page Linux
            reads up to some MB that nobody asked for; now only pages of the announced rows are read, many at a time.
    """
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(mapped, dtype, count=int(np.prod(shape, dtype=np.int64)), offset=start).reshape(shape)
    if not as_rows:
        return Mapped(array, None)
    mapped.madvise(mmap.MADV_RANDOM)
    row_bytes = array[:1].nbytes

    def read_ahead(rows: NDArray[np.int64]) -> None:
        for row in np.sort(rows).tolist():
            first = start + row * row_bytes
            begin = first - first % _PAGE
            mapped.madvise(mmap.MADV_WILLNEED, begin, first + row_bytes - begin)

    return Mapped(array, read_ahead)
