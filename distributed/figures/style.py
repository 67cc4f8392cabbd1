"""The style of all figures: colours (Okabe and Ito 2008, safe for colour-blind readers), axes, and file formats.

Figures are created without pyplot: they need no display and leave no global state behind.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b2028"
"""Colour of text and axes. In an SVG it becomes the colour of the text around the figure."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SPLITS = {"train": COLOURS[0], "validation": COLOURS[1], "test": COLOURS[2]}

_STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # names of files and classes are not formulas
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "the same file for the same figure",
    "savefig.dpi": 150,
}


@contextmanager
def figure(width: float, height: float, *, columns: int = 1) -> Iterator[tuple["Figure", list["Axes"]]]:
    """Yield a figure of this size in inches, with axes side by side; draw and save it inside the context."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font")  # of class names, e.g. Chinese ones
        made = Figure(figsize=(width, height), layout="constrained")
        yield made, list(made.subplots(1, columns, squeeze=False)[0])


def as_png(made: "Figure", *, description: str | None = None) -> bytes:
    """Return the figure as PNG on a white background.

    Args:
        description: text for the file's metadata.
    """
    file = io.BytesIO()
    made.savefig(file, format="png", facecolor="white", metadata={"Description": description} if description else None)
    return file.getvalue()


def as_svg(made: "Figure", *, label: str, shrinks: bool = True) -> str:
    """Return the figure as an SVG element that adopts the page's background, text colour and font.

    Args:
        label: a description for screen readers.
        shrinks: whether the figure may be scaled down to fit the page.
    """
    file = io.StringIO()
    made.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    # Several figures share a page, where ids must be unique; nothing refers to those of groups.
    svg = re.sub(r'<g id="[a-zA-Z0-9_.]+">', "<g>", svg)
    svg = re.sub(r"(font: [^;\"]*?[0-9.]+px) [^;\"]+", r"\1 system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="0 0 ([0-9.]+) [0-9.]+"', head)
    assert box is not None
    width = f"{1.35 * float(box[1]):.0f}px"
    style = f"width:100%;max-width:{width};height:auto" if shrinks else f"width:{width};height:auto"
    return f'<svg {box[0]} role="img" aria-label="{escape(label)}" style="{style}">{body}'
