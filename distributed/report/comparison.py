"""The sections of the page that compare several runs. Imports no torch."""

from collections.abc import Sequence
from itertools import combinations

from distributed.compare import Recorded, differing_conditions
from distributed.config import differences, toml_value
from distributed.figures.curves import overlaid_curves
from distributed.figures.style import as_png, as_svg
from distributed.report.history import History
from distributed.report.narrative import clock, dataset_name
from distributed.report.page import Absent, Html, section, section_or_reason, table, text


def comparison_sections(runs: Sequence[History]) -> list[Html]:
    """Return results, curves, differing settings, and whether the runs are bit-identical."""
    return [
        "<h2>Comparison</h2>",
        section("Results", _results(runs)),
        section_or_reason("Curves", lambda: [curves_as_svg(runs)]),
        _settings(runs),
        _bits(runs),
    ]


def curves_as_svg(runs: Sequence[History]) -> Html:
    """Draw the runs' curves over each other.

    Raises:
        Absent: no run has finished an epoch.
    """
    split = _split_to_draw(runs)
    with overlaid_curves([run.to_draw for run in runs], split=split) as figure:
        return as_svg(
            figure, label=f"training loss, {split} accuracy and learning rate of {len(runs)} runs over epochs"
        )


def curves_as_png(runs: Sequence[History]) -> bytes:
    """Draw the runs' curves over each other. Raises Absent like `curves_as_svg`."""
    with overlaid_curves([run.to_draw for run in runs], split=_split_to_draw(runs)) as figure:
        return as_png(figure)


def _split_to_draw(runs: Sequence[History]) -> str:
    logs = [run.log for run in runs if run.log.epochs]
    if not logs:
        raise Absent("No run has finished an epoch yet, so there is nothing to draw.")
    return "validation" if all(log.best("validation") for log in logs) else "test"


def _results(runs: Sequence[History]) -> Html:
    rows = []
    further = list(dict.fromkeys(name for run in runs for name in run.log.further_metrics))
    for run in runs:
        best, test, time = run.log.best("validation"), run.log.last("test"), run.wall_time
        rows.append(
            [
                run.name,
                run.config.model.name,
                dataset_name(run),
                f"{run.log.finished_epochs} of {run.config.epochs}",
                f"{best.value:.2%} (epoch {best.epoch})" if best else "–",
                f"{test.value:.2%}" if test else "–",
                *(f"{point.value:.4f}" if (point := run.log.last("test", name)) else "–" for name in further),
                clock(time.total) if time.complete else f"more than {clock(time.total)}",
                run.status.status or "unknown",
            ]
        )
    metrics = ["best validation", "last test", *(f"last test {name}" for name in further)]
    headings = ["run", "model", "data", "epochs", *metrics, "wall time", "status"]
    return table(headings, rows, numbers=list(range(4, 4 + len(metrics))))


def _settings(runs: Sequence[History]) -> Html:
    """List every setting that differs between the runs."""
    found: dict[str, list[str]] = {}
    first = runs[0].config
    for column, run in enumerate(runs[1:], 1):
        for path, old, new in differences(first, run.config):
            if path != "run_dir":
                found.setdefault(path, [toml_value(old)] * len(runs))[column] = toml_value(new)
    if not found:
        return section("Differing settings", text("None: all settings are equal."))
    rows = [[path, *values] for path, values in found.items()]
    return section("Differing settings", table(["setting", *(run.name for run in runs)], rows))


def _bits(runs: Sequence[History]) -> Html:
    sentences = []
    recorded = [Recorded(run.folder) for run in runs]
    for (a, of_a), (b, of_b) in combinations(zip(runs, recorded, strict=True), 2):
        found, names = of_a.compare(of_b), f"{a.name} and {b.name}"
        if not found.logged and not found.saves:
            sentences.append(f"{names} cannot be compared: they have no logged step and no saved state in common.")
        elif not found.divergences:
            sentences.append(f"{names} are bit-identical: {found.extent}.")
        else:
            first = found.divergences[0]
            # Differing settings have a section of their own.
            others = [line for line in differing_conditions(a.folder, b.folder) if not line.startswith("config: ")]
            sentences.append(
                f"{names} are not bit-identical ({found.extent}). They diverged by step {first.step}: {first.description}. "
                f"{'Besides settings: ' + '; '.join(others) if others else 'Versions and machine are the same'}."
            )
    return section("Bit-identical?", text(*sentences))
