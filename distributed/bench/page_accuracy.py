"""The block of time to accuracy in docs/benchmarks.md, in Markdown."""

from collections.abc import Mapping
from typing import Any

from distributed.bench.accuracy import report
from distributed.bench.accuracy_results import Run
from distributed.documents.markdown import paragraph

FILE = "bench_accuracy_cpu"


def accuracy(content: Mapping[str, dict[str, Any]]) -> str:
    """Return the table of `bench accuracy`, and what timm's side does otherwise."""
    if not content.get(FILE, {}).get("runs"):
        return "Not run yet."
    results = content[FILE]
    settings, machine = results["settings"], results["machine"]
    versions = machine["versions"]
    timm = f", timm {versions['timm']}" if "timm" in versions else ""
    dates = sorted(run["date"] for run in results["runs"])
    measured = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    intro = (
        f"{settings['model']['name']}, {settings['data']['name']}, {settings['epochs']} epochs, batch "
        f"{settings['global_batch_size']}, {settings['optim']['name']}, {settings['precision']}: mean and standard deviation "
        f"over the seeds. {machine['cores']} cores ({machine['processor']}), torch {versions['torch']}{timm}, "
        f"{measured}, `{results['command']} --data.root FOLDER` ([raw](../results/{FILE}.json))."
    )
    otherwise = f"On timm's side: {' '.join(results['differences'])}" if results["differences"] else ""
    table = report([Run(**run) for run in results["runs"]])
    return f"{paragraph(intro)}\n\n{table}\n\n{paragraph(otherwise)}".rstrip()
