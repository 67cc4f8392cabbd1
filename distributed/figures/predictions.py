"""Draws images with their predicted classes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from distributed.errors import plain
from distributed.figures.style import COLOURS, INK, figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

_COLUMNS = 3


@contextmanager
def predictions_figure(
    images: Sequence["NDArray[np.float32]"], tops: Sequence[Sequence[tuple[str, float]]], titles: Sequence[str]
) -> Iterator["Figure"]:
    """Draw a grid: each image [height, width, 3] beside bars of its classes (name, probability), most probable first."""
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    with figure(4.6 * columns, 2.1 * rows) as (made, [frame]):
        frame.remove()
        grid = made.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.1] * columns)
        for axes in grid.flat:
            axes.axis("off")
        for place, (image, top, title) in enumerate(zip(images, tops, map(plain, titles), strict=True)):
            row, column = place // columns, 2 * (place % columns)
            shown, bars = grid[row, column], grid[row, column + 1]
            shown.imshow(image, interpolation="nearest")
            shown.set_title(title if len(title) <= 24 else f"{title[:10]}…{title[-12:]}", fontsize=8)
            # Class names are written over the bars, where long ones have room.
            bars.barh(range(len(top)), [p for _, p in top], color=COLOURS[0], alpha=0.35, height=0.8)
            for line, (name, probability) in enumerate(top):
                bars.text(0.02, line, f"{plain(name)}  {probability:.1%}", va="center", fontsize=8, color=INK)
            bars.set(xlim=(0, 1), ylim=(len(top) - 0.5, -0.5))
        yield made
