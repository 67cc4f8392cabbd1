"""What the page says of several runs beside each other. Imports no torch."""

from collections.abc import Sequence
from itertools import combinations

from distributed.compare import circumstances, compare
from distributed.config import differences, toml_value
from distributed.report.curves import overlaid_curves
from distributed.report.history import History
from distributed.report.narrative import clock
from distributed.report.page import Absent, Html, missing, part, table, text


def together(runs: Sequence[History]) -> list[Html]:
    """Results, curves, differing settings, and whether bits are the same."""
    try:
        curves = part("Their curves", overlaid_curves(runs))
    except Absent as reason:
        curves = missing("Their curves", str(reason))
    return [
        "<h2>The runs beside each other</h2>",
        part("Results", _results(runs)),
        curves,
        _settings(runs),
        _bits(runs),
    ]


def _results(runs: Sequence[History]) -> Html:
    rows = []
    for run in runs:
        best, (_, tests), (time, whole) = run.best("validation"), run.curve("test", "accuracy"), run.wall_time
        rows.append(
            [
                run.name,
                run.config.model.name,
                run.config.data.name,
                f"{len(run.epochs)} of {run.config.epochs}",
                f"{best[1]:.2%} (epoch {best[0]})" if best else "–",
                f"{tests[-1]:.2%}" if tests else "–",
                clock(time) if whole else f"more than {clock(time)}",
                run.status.status or "unknown",
            ]
        )
    headings = ["run", "network", "data", "epochs", "best validation", "last test", "wall time", "status"]
    return table(headings, rows, numbers=[4, 5])


def _settings(runs: Sequence[History]) -> Html:
    """Every setting that is not the same in all runs."""
    found: dict[str, list[str]] = {}
    first = runs[0].config
    for place, run in enumerate(runs[1:], 1):
        for path, old, new in differences(first, run.config):
            if path != "run_dir":
                found.setdefault(path, [toml_value(old)] * len(runs))[place] = toml_value(new)
    if not found:
        return part("What was set differently", text("Nothing: all settings are the same."))
    rows = [[path, *values] for path, values in found.items()]
    return part("What was set differently", table(["setting", *(run.name for run in runs)], rows))


def _bits(runs: Sequence[History]) -> Html:
    said = []
    for a, b in combinations(runs, 2):
        found, names = compare(a.folder, b.folder), f"{a.name} and {b.name}"
        extent = f"{found.figures} logged lines and {found.saves} saved states in common"
        if not found.figures and not found.saves:
            said.append(f"{names} have no logged step and no saved state in common, so nothing can be said.")
        elif not found.partings:
            said.append(f"{names} are the same bits: {extent}.")
        else:
            why = circumstances(a.folder, b.folder) or ["nothing differed in config, versions and machine"]
            said.append(
                f"{names} are not the same bits ({extent}). Parted by step {found.partings[0].step}: "
                f"{found.partings[0].where}. What differed: {'; '.join(why)}."
            )
    return part("Whether they are the same bits", text(*said))
