"""`python -m distributed.experiments page`: writes the figures and pictures of docs/results.md from results/results.json."""

from collections.abc import Callable, Sequence
from pathlib import Path

from distributed.documents.blocks import CHECKOUT, page_in, with_blocks
from distributed.experiments.page_blocks import ablations, alternatives, curves, recipes, references_cpu, references_gpu
from distributed.experiments.pictures import FOLDER, pictures
from distributed.experiments.records import read_results
from distributed.experiments.result import Result
from distributed.process.optional_output import requested_output
from distributed.process.output_file import write_output

BLOCKS: dict[str, Callable[[Sequence[Result]], str]] = {
    "recipes": recipes,
    "curves": curves,
    "ablations": ablations,
    "alternatives": alternatives,
    "references_cpu": references_cpu,
    "references_gpu": references_gpu,
}


def write_page(checkout: Path = CHECKOUT) -> list[Path]:
    """Draw the pictures, replace the figures of the page, and return the files written.

    Raises:
        InputError: there is no such page, e.g. in an installed package, or the results cannot be read.
        StorageError: a file cannot be written.
    """
    page = page_in(checkout, "results.md")
    results = read_results(checkout / "results" / "results.json")
    text = with_blocks(page.read_text(), BLOCKS, results)
    drawn = {checkout / FOLDER / picture.name: picture for picture in pictures(results)}
    for file, picture in drawn.items():
        with requested_output("page", file):
            write_output(file, picture.png())
    with requested_output("page", page):
        write_output(page, text.encode())
    return [*drawn, page]
