"""Builds a page from its elements. Styles, drawings and images are embedded in the one file. Imports no torch."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from loguru import logger

from distributed.errors import InputError, NotFiniteError
from distributed.process.optional_output import one_line

Html = str
"""Markup in which all text is escaped."""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1b2028; --quiet: #5d6673; --line: #e2e4e8;
  --accent: #0072b2; --warn: #9a3f00; --warn-page: #fdf1e7; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --card: #1b1f26; --ink: #e4e7ec; --quiet: #98a2b0; --line: #2e343e; --accent: #6cb8e8;
    --warn: #f0a868; --warn-page: #2b2119; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 56px 0 8px; padding-top: 20px; border-top: 2px solid var(--ink); overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 78ch; }
a { color: var(--accent); }
.quiet { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin: 16px 0; }
.missing { color: var(--warn); background: var(--warn-page); border-radius: 6px; padding: 8px 12px; margin: 0; }
.scroll { overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.figures b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.figures span { color: var(--quiet); font-size: 13px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: 12.5px; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
tr:last-child td { border-bottom: 0; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)); gap: 12px 10px; }
.images.wide { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
.images figure { margin: 0; font-size: 12px; line-height: 1.3; color: var(--quiet); }
.images figure b { color: var(--ink); font-weight: 600; }
.images img { width: 100%; display: block; border-radius: 4px; margin-bottom: 4px; image-rendering: pixelated; }
pre { font: 12.5px/1.5 ui-monospace, monospace; overflow-x: auto; margin: 8px 0 0; }
summary { cursor: pointer; font-weight: 600; }
svg { display: block; }
.card > :last-child, .card > :last-child p { margin-bottom: 0; }
.beside { display: flex; flex-wrap: wrap; gap: 24px 40px; align-items: flex-start; }
.beside > :first-child { flex: 1 1 480px; min-width: 0; }
nav { margin: 16px 0 0; }
nav a { margin-right: 16px; }
"""


class Absent(Exception):
    """A section has nothing to show; the message says why in a sentence."""


def page(title: str, sections: Iterable[Html]) -> str:
    """Return the complete document."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *content: Html) -> Html:
    """Return a framed section of the page under its own heading."""
    return f'<section class="card">\n<h3>{escape(title)}</h3>\n' + "\n".join(content) + "\n</section>"


def _missing(title: str, why: str) -> Html:
    """Return a section that says why its content could not be created."""
    return section(title, f'<p class="missing">{escape(why)}</p>')


def section_or_reason(title: str, make: Callable[[], Sequence[Html]]) -> Html:
    """Return the section that `make` fills, or, if it cannot, a section that says why."""
    try:
        return section(title, *make())
    except (Absent, InputError, NotFiniteError) as error:
        return _missing(title, f"This section could not be created. {error}")
    except Exception as error:  # e.g. no matplotlib; or a run in progress deletes the checkpoint being read
        logger.warning("{}: {}; continuing without it", title, one_line(error))
        return _missing(title, f"This section could not be created: {one_line(error)}.")


def text(*sentences: str, quiet: bool = False) -> Html:
    """Return a paragraph for each text."""
    attribute = ' class="quiet"' if quiet else ""
    return "\n".join(f"<p{attribute}>{escape(sentence)}</p>" for sentence in sentences)


def key_figures(figures: Sequence[tuple[str, str]]) -> Html:
    """Return a row of cards from (label, value) pairs."""
    cards = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in figures)
    return f'<div class="figures">{cards}</div>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> Html:
    """Return a table; `numbers` are the columns to align to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column in numbers else ''}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", headings)}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


class Picture(NamedTuple):
    """A PNG image with a description for screen readers and, optionally, a visible caption."""

    png: bytes
    alt: str
    caption: Html = ""


def pictures(images: Iterable[Picture], *, wide: bool = False) -> Html:
    """Return a grid of images."""
    figures = "\n".join(
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{b64encode(png).decode()}">{caption}</figure>'
        for png, alt, caption in images
    )
    return f'<div class="images{" wide" if wide else ""}">\n{figures}\n</div>'


def beside(*content: Html) -> Html:
    """Put elements side by side if the page is wide enough, otherwise below each other."""
    return '<div class="beside">' + "".join(f"<div>{each}</div>" for each in content) + "</div>"


def scrolled(content: Html) -> Html:
    """Let content that is wider than the page scroll."""
    return f'<div class="scroll">{content}</div>'


def folded(title: str, content: str) -> Html:
    """Return plain text that unfolds on demand."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(content)}</pre></details>"
