"""`python -m distributed.bench page`: writes the figures of docs/benchmarks.md from the files in results/.

The page has the words, and between two comments per block the figures, which this command replaces.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.bench.page_accuracy import accuracy
from distributed.bench.page_blocks import exact_price, others, scaling, train_cpu, train_gpu
from distributed.errors import InputError
from distributed.files import write_output

CHECKOUT = Path(__file__).parents[2]
Results = dict[str, Any]
BLOCKS: dict[str, Callable[[dict[str, Results]], str]] = {
    "train_cpu": train_cpu,
    "accuracy": accuracy,
    "exact_price": exact_price,
    "train_gpu": train_gpu,
    "scaling": scaling,
    "others": others,
}
_BLOCK = re.compile(r"(<!-- figures: (\w+), [^>]*-->\n).*?(\n<!-- end of figures -->)", re.DOTALL)


def write_page(checkout: Path = CHECKOUT) -> Path:
    """Replace the figures of the page, and return its path.

    Raises:
        InputError: there is no such page, e.g. in an installed package.
    """
    page = checkout / "docs" / "benchmarks.md"
    if not page.is_file():
        raise InputError(f"page: {page} does not exist; run this in a checkout")
    write_output(page, page_with_figures(page.read_text(), checkout / "results").encode())
    return page


def page_with_figures(page: str, results: Path) -> str:
    """Return the page with the figures of all blocks made from the files `bench_*.json`.

    Raises:
        InputError: the page lacks a block, or has an unknown one.
    """
    names = [found[1] for found in _BLOCK.findall(page)]
    if sorted(names) != sorted(BLOCKS):
        raise InputError(f"page: has the blocks {', '.join(names)}; should have {', '.join(BLOCKS)}, each once")
    content = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("bench_*.json"))}
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](content)}{found[3]}", page)
