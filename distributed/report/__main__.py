"""`python -m distributed.report RUN [RUN ...] [--out report.html]`: write one page on one run or several.

The page is a single self-contained file. Anything that cannot be shown, e.g. without a checkpoint or the data, is named there.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from distributed.errors import ExitCode, prints_errors
from distributed.files import home_path
from distributed.inference.saved_run import choose_checkpoint, has_data_root, with_data_root, without_download
from distributed.process import logs
from distributed.process.arguments import OneLineParser
from distributed.process.optional_output import requested_output
from distributed.process.output_file import check_writable, write_output
from distributed.process.streams import run_command
from distributed.report.history import History, read_history
from distributed.report.narrative import dataset_name
from distributed.report.page import Html, page, text
from distributed.run.checkpoint_layout import committed_names, is_committed


@prints_errors
def main() -> int:
    """Write the page, print its path and size, and return the exit code."""
    parser = OneLineParser(prog="python -m distributed.report", description=__doc__)
    parser.add_argument("runs", type=home_path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=home_path, metavar="FILE", help="default: RUN/report.html for one run, report.html for several"
    )
    parser.add_argument("--checkpoint", default="auto", help="best, latest or a name; auto: best if there is one")
    parser.add_argument("--data.root", dest="root", type=home_path, help="folder with the data set, if it has moved")
    arguments = parser.parse_args()
    logs.terminal_logs(0, level="WARNING")
    out = arguments.out or (arguments.runs[0] / "report.html" if len(arguments.runs) == 1 else Path("report.html"))
    runs = [read_history(run) for run in arguments.runs]
    _check_options(arguments, runs)
    check_writable("--out", out)
    runs = _with_unique_names([_with_root(run, arguments.root) for run in runs])
    content = _page(runs, checkpoint=arguments.checkpoint).encode(errors="backslashreplace")  # a folder's name
    with requested_output("--out", out):
        write_output(out, content)
    print(f"{out} ({len(content) / 2**20:.1f} MiB)")
    return ExitCode.FINISHED


def _check_options(arguments: argparse.Namespace, runs: Sequence[History]) -> None:
    """Raise InputError if --data.root or --checkpoint applies to none of the runs."""
    if arguments.root and not any(has_data_root(run.config) for run in runs):
        with_data_root(runs[0].config, arguments.root)  # raises
    saved = [run for run in runs if committed_names(run.folder.checkpoints)]
    if arguments.checkpoint != "auto" and not any(
        is_committed(run.folder.checkpoints / arguments.checkpoint) for run in saved
    ):
        choose_checkpoint((saved or runs)[0].folder.path, arguments.checkpoint)  # raises, and lists the names


def _with_root(run: History, root: Path | None) -> History:
    """Return the run with its data in folder `root`, unless its images are generated."""
    config = with_data_root(run.config, root) if has_data_root(run.config) else run.config
    return replace(run, config=without_download(config))


def _with_unique_names(runs: Sequence[History]) -> list[History]:
    """Name runs by their paths if their folders have the same name."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder.path)) if names.count(run.name) > 1 else run for run in runs]


def _page(runs: Sequence[History], *, checkpoint: str) -> str:
    from distributed.report.comparison import comparison_sections
    from distributed.report.run_sections import run_sections

    subjects = ", ".join(dict.fromkeys(f"{run.config.model.name} on {dataset_name(run)}" for run in runs))
    title = f"{subjects}: {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs of {subjects}"
    sections: list[Html] = [
        f"<h1>{escape(title)}</h1>",
        text(
            f"Generated from the run folder{'s' if runs[1:] else ''} on {time.strftime('%Y-%m-%d %H:%M %Z')}.",
            quiet=True,
        ),
    ]
    if len(runs) > 1:
        links = "".join(f'<a href="#run-{index}">{escape(run.name)}</a>' for index, run in enumerate(runs))
        sections += [f"<nav>{links}</nav>", *comparison_sections(runs)]
    for index, run in enumerate(runs):
        sections += run_sections(run, checkpoint=checkpoint, anchor=f"run-{index}")
    return page(title, sections)


if __name__ == "__main__":
    run_command(main, skip_cleanup=True)
