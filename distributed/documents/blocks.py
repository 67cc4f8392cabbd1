"""Pages with generated figures: a command replaces the blocks between two comments, and the words around them stay.

A block begins with `<!-- figures: NAME, written by COMMAND -->` and ends with `<!-- end of figures -->`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from distributed.errors import InputError

CHECKOUT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- figures: (\w+), [^>]*-->\n).*?(\n<!-- end of figures -->)", re.DOTALL)
Content = TypeVar("Content")


def page_in(checkout: Path, name: str) -> Path:
    """Return the path of a page in docs/.

    Raises:
        InputError: there is no such page, e.g. in an installed package.
    """
    page = checkout / "docs" / name
    if not page.is_file():
        raise InputError(f"page: {page} does not exist; run this in a checkout")
    return page


def with_blocks(page: str, blocks: Mapping[str, Callable[[Content], str]], content: Content) -> str:
    """Return the page with each block replaced by what the function of its name makes of the content.

    Raises:
        InputError: the page lacks a block, or has an unknown one.
    """
    names = [found[1] for found in _BLOCK.findall(page)]
    if sorted(names) != sorted(blocks):
        raise InputError(f"page: has the blocks {', '.join(names)}; should have {', '.join(blocks)}, each once")
    return _BLOCK.sub(lambda found: f"{found[1]}{blocks[found[2]](content)}{found[3]}", page)
