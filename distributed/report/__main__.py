"""`python -m distributed.report RUN [RUN ...] [--out report.html]`: one page on runs, for somebody who was not there.

The page is a single file that needs nothing else. What cannot be shown (no checkpoint yet, data not there) is said.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import check_writable, home_path, write_output
from distributed.inference.saved_run import has_data_root, with_data_root, without_download
from distributed.process import logs
from distributed.process.optional_output import requested_output
from distributed.process.streams import run_command
from distributed.report.history import History, read_history
from distributed.report.page import Html, page, text


def main() -> int:
    """The exit code; prints where the page lies."""
    parser = argparse.ArgumentParser(prog="python -m distributed.report", description=__doc__)
    parser.add_argument("runs", type=home_path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", type=home_path, metavar="FILE", help="RUN/report.html of one run, else report.html, if not given"
    )
    parser.add_argument("--checkpoint", default="auto", help="best, latest or a name; auto: best if there is one")
    parser.add_argument("--data.root", dest="root", type=home_path, help="where the data set is now")
    arguments = parser.parse_args()
    logs.terminal_logs(0, level="WARNING")
    out = arguments.out or (arguments.runs[0] / "report.html" if len(arguments.runs) == 1 else Path("report.html"))
    try:
        runs = [read_history(run) for run in arguments.runs]
        check_writable("--out", out)
    except InputError as error:
        return error.report()
    runs = _told_apart([_with_root(run, arguments.root) for run in runs])
    try:
        content = _page(runs, checkpoint=arguments.checkpoint).encode()
        with requested_output("--out", out):
            write_output(out, content)
    except (InputError, StorageError) as error:
        return error.report()
    print(f"{out} ({len(content) / 2**20:.1f} MiB)")
    return ExitCode.FINISHED


def _with_root(run: History, root: Path | None) -> History:
    """With its data where it lies now; of several runs some may be on generated images."""
    config = with_data_root(run.config, root) if has_data_root(run.config) else run.config
    return replace(run, config=without_download(config))


def _told_apart(runs: Sequence[History]) -> list[History]:
    """Runs whose folders have the same name go by their paths."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder.path)) if names.count(run.name) > 1 else run for run in runs]


def _page(runs: Sequence[History], *, checkpoint: str) -> str:
    from distributed.report.comparison import together
    from distributed.report.run_sections import run_parts

    what = ", ".join(dict.fromkeys(f"{run.config.model.name} on {run.config.data.name}" for run in runs))
    title = f"{what}: {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs of {what}"
    parts: list[Html] = [
        f"<h1>{escape(title)}</h1>",
        text(f"Made {time.strftime('%Y-%m-%d %H:%M %Z')} from what the run folders held then.", quiet=True),
    ]
    if len(runs) > 1:
        links = "".join(f'<a href="#run-{place}">{escape(run.name)}</a>' for place, run in enumerate(runs))
        parts += [f"<nav>{links}</nav>", *together(runs)]
    for place, run in enumerate(runs):
        parts += run_parts(run, checkpoint=checkpoint, anchor=f"run-{place}")
    return page(title, parts)


if __name__ == "__main__":
    run_command(main, skip_cleanup=True)
