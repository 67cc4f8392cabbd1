"""The blocks of docs/results.md, in Markdown. Each takes all records."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from distributed.documents.markdown import listed, paragraph, table
from distributed.experiments.catalogue import ABLATIONS, RECIPES, REFERENCES, Kind, Recipe, Reference
from distributed.experiments.pictures import FOLDER, pictures
from distributed.experiments.result import Device, Result
from distributed.experiments.selection import DEVICES, Comparison, as_planned, comparisons, spread
from distributed.experiments.summary import DATA_NAMES, epochs, minutes, mode, per_cent

Results = Sequence[Result]


def references_cpu(results: Results) -> str:
    """Return the table of the references' results on a CPU."""
    return _references(results, "cpu")


def references_gpu(results: Results) -> str:
    """Return the table of the references' results on a GPU."""
    return _references(results, "gpu")


def _references(results: Results, device: Device) -> str:
    header = ["id", "network, data", "epochs", "validation", "test", "reference: validation, test", "minutes", "mode"]
    rows, shown = [], []
    for reference in REFERENCES:
        reported = f"{per_cent(reference.validation)}, {per_cent(reference.test)}"
        found = as_planned(results, reference, device)
        shown += found
        rows += [_reference_row(reference, result, reported) for result in found]
        if not found:
            rows.append([reference.id, "", "not yet run", "", "", reported, "", ""])
    return f"{paragraph(_measured(shown, 'reference'))}\n\n{table(header, rows)}" if shown else "Not yet run."


def _reference_row(reference: Reference, result: Result, reported: str) -> list[str]:
    name = reference.id if result.seed == reference.seeds[0] else f"{reference.id}, seed {result.seed}"
    best = f" at epoch {result.at_epoch}" if result.validation is not None else ""
    return [
        name, _subject(result), epochs(result), f"{per_cent(result.validation)}{best}", per_cent(result.test), reported,
        minutes(result.minutes), mode(result),
    ]  # fmt: skip


def recipes(results: Results) -> str:
    """Return the table of the recipes: mean and standard deviation over seeds, and each seed."""
    header = ["recipe", "network, data", "epochs", "test", "seeds", "target", "minutes", "on"]
    rows: list[list[str]] = []
    shown: list[Result] = []
    for recipe in RECIPES:
        found = [as_planned(results, recipe, device) for device in DEVICES]
        shown += [result for runs in found for result in runs]
        rows += [_recipe_row(recipe, runs) for runs in found if runs]
        if not any(found):
            rows.append([f"`{recipe.id}`", "", "", "not yet run", "", per_cent(recipe.target), "", ""])
    measured = f"{paragraph(_measured(shown, 'recipe'))}\n\n" if shown else ""
    return f"{measured}{table(header, rows)}"


def _recipe_row(recipe: Recipe, runs: Results) -> list[str]:
    """Return the row of the runs on one kind of device, at least one. Only complete runs count in means.

    Minutes are a mean per mode: a run in float32 may take three times as long as one in bfloat16.
    """
    over_seeds, test = spread(runs), "-"
    in_mode: dict[str, list[float]] = {mode(run): [] for run in runs}
    for run in runs:
        if run.is_complete:
            in_mode[mode(run)].append(run.minutes)
    if over_seeds:
        deviation = "" if over_seeds.deviation is None else f" ± {over_seeds.deviation:.2f}"
        test = f"{over_seeds.mean:.2f}{deviation} %"
    seeds = [
        f"{run.seed}: {'-' if run.test is None else f'{run.test:.2f}'}"
        + ("" if run.is_complete else f" after {run.epochs} epochs")
        for run in runs
    ]
    return [
        f"[`{recipe.id}`](../{recipe.config})", _subject(runs[0]), str(runs[0].of_epochs), test, ", ".join(seeds),
        per_cent(recipe.target),
        "; ".join(minutes(fmean(each)) if each else "-" for each in in_mode.values()),
        f"{runs[0].machine.device}, {'; '.join(in_mode)}",
    ]  # fmt: skip


def ablations(results: Results) -> str:
    """Return a table per recipe and kind of device: the validation accuracy without each setting."""
    return _comparisons(results, alternatives=False)


def alternatives(results: Results) -> str:
    """Return a table per recipe and kind of device: the validation accuracy with each alternative."""
    return _comparisons(results, alternatives=True)


def _comparisons(results: Results, *, alternatives: bool) -> str:
    header = ["change", "settings", "epochs", "validation", "difference, points", "minutes"]
    parts = []
    for config in dict.fromkeys(ablation.config for ablation in ABLATIONS):
        for device in DEVICES:
            compared = list(comparisons(results, [each for each in ABLATIONS if each.config == config], device))
            shown = [each for each in compared if each.ablation.alternative == alternatives]
            if shown:
                modes = _distinct(mode(each.result) for each in shown)
                measured = f"{_link(config)}, {modes}: {_measured([each.result for each in shown], 'ablation')}"
                run = {each.ablation.id for each in compared}
                missing = [
                    [each.change, _code(each.changed), "not yet run", "", "", ""]
                    for each in ABLATIONS
                    if each.config == config and each.alternative == alternatives and each.id not in run
                ]
                parts.append(f"{paragraph(measured)}\n\n{table(header, [*map(_comparison_row, shown), *missing])}")
    return "\n\n".join(parts) if parts else "Not yet run."


def _comparison_row(found: Comparison) -> list[str]:
    ablation, result = found.ablation, found.result
    difference = "" if ablation.is_base else "-" if found.difference is None else f"{found.difference:+.2f}"
    return [
        ablation.change, _code(ablation.changed), epochs(result), per_cent(result.validation), difference,
        minutes(result.minutes),
    ]  # fmt: skip


def curves(results: Results) -> str:
    """Return the pictures of the curves."""
    found = [f"![{picture.title}](../{FOLDER}/{picture.name})" for picture in pictures(results)]
    return "\n\n".join(found) if found else "No run with a recorded curve yet."


def _measured(results: Results, kind: Kind) -> str:
    """Describe machines, versions, dates and command of records, with a link to their file."""
    machines = _distinct(
        f"{r.machine.device}, {r.machine.cores} cores"
        if r.machine.kind == "cpu" and r.machine.cores
        else r.machine.device
        for r in results
    )
    torch = listed(sorted({result.versions["torch"] for result in results}))
    dates = sorted({result.date for result in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    command = f"python -m distributed.experiments --only {kind} --data.root FOLDER"
    return f"{machines}; torch {torch}; {when}; `{command}` ([raw](../results/results.json))."


def _subject(result: Result) -> str:
    return f"{result.model}, {DATA_NAMES.get(result.data, result.data)}"


def _link(config: str) -> str:
    return f"[`{config.removeprefix('configs/')}`](../{config})"


def _code(settings: Sequence[str]) -> str:
    return " ".join(f"`{setting}`" for setting in settings)


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
