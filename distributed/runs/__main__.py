"""`python -m distributed.runs [FOLDER]`: list all runs in a folder and its subfolders, with status and results.

A run whose process ended without recording its end is `interrupted`: the same command resumes it.
"""

from pathlib import Path

from distributed.config.layers import shown
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import home_path
from distributed.process.arguments import OneLineParser
from distributed.process.streams import run_command
from distributed.run.lock_holder import SlurmQueries
from distributed.runs.outcome import outcome_of, runs_below
from distributed.runs.table import HEADINGS, cells, in_columns


@prints_errors
def main() -> int:
    """Return the exit code: 0, or 2 if the folder holds no runs."""
    parser = OneLineParser(prog="python -m distributed.runs", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=home_path, default=Path("runs"), metavar="FOLDER", help="default: runs"
    )
    folder = parser.parse_args().folder
    runs = _find_runs(folder)
    query_slurm = SlurmQueries()
    rows = [[_name(run, folder), *cells(outcome_of(run, query_slurm))] for run in runs]
    print(*in_columns([["run", *HEADINGS], *rows]), sep="\n")
    return ExitCode.FINISHED


def _find_runs(folder: Path) -> list[Path]:
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; name the folder that holds runs") from None
    if not (runs := runs_below(folder)):
        raise InputError(f"{folder}: no runs in it; name the folder that holds runs")
    return runs


def _name(run: Path, folder: Path) -> str:
    return shown(folder.resolve().name if run == folder else run.relative_to(folder))


if __name__ == "__main__":
    run_command(main)
