"""`python -m distributed.bench page`: writes the figures of docs/benchmarks.md from the files in results/."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.bench.page_accuracy import accuracy
from distributed.bench.page_blocks import exact_price, others, scaling, train_cpu, train_gpu
from distributed.documents.blocks import CHECKOUT, page_in, with_blocks
from distributed.process.output_file import write_output

Results = dict[str, Any]
BLOCKS: dict[str, Callable[[dict[str, Results]], str]] = {
    "train_cpu": train_cpu,
    "accuracy": accuracy,
    "exact_price": exact_price,
    "train_gpu": train_gpu,
    "scaling": scaling,
    "others": others,
}


def write_page(checkout: Path = CHECKOUT) -> Path:
    """Replace the figures of the page, and return its path.

    Raises:
        InputError: there is no such page, e.g. in an installed package.
    """
    page = page_in(checkout, "benchmarks.md")
    write_output(page, page_with_figures(page.read_text(), checkout / "results").encode())
    return page


def page_with_figures(page: str, results: Path) -> str:
    """Return the page with the figures of all blocks made from the files `bench_*.json`.

    Raises:
        InputError: the page lacks a block, or has an unknown one.
    """
    content = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("bench_*.json"))}
    return with_blocks(page, BLOCKS, content)
