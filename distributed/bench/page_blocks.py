"""The blocks of figures in docs/benchmarks.md, in Markdown. Each takes the content of results/, by file name without suffix."""

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from distributed.bench import scaling_report
from distributed.bench.peers import PEERS
from distributed.bench.scaling import medians
from distributed.bench.training_speed import DEFAULT, PEER_NAMES
from distributed.documents.markdown import listed, paragraph, table
from distributed.errors import InputError

Results = Mapping[str, Any]
Content = Mapping[str, dict[str, Any]]
_LABELS = {
    r"references' plain loop": "the references' plain loop: PIL, torchvision transforms, 2 loader workers, float32",
    r"compute alone": "compute alone: one fixed batch, torch's BatchNorm2d and Dropout, channels last",
    r"ours \(fast\)": "fast mode",
    r"ours \(exact, 8 shards\)": "exact mode, 8 shards",
    re.escape(DEFAULT): "the default, which `make train` runs: exact mode, 8 shards",
}
_REFERENCES = {
    r"references' plain loop": "the plain loop", r"compute alone": "compute alone", r"timm": "timm",
}  # fmt: skip


def train_cpu(content: Content) -> str:
    """Return the table of `bench train` on a CPU."""
    results = content["bench_train_cpu"]
    rounds: list[dict[str, float]] = [
        {re.sub(r", batch \d+$", "", name): value for name, value in figures.items()} for figures in results["rounds"]
    ]
    speeds = medians(rounds)
    names = list(speeds)
    references = {label: name for start, label in _REFERENCES.items() for name in names if re.match(start, name)}
    best = max((name for name in names if name.startswith("ours (fast)")), key=speeds.__getitem__, default="")
    header = ["", "images/s", *(f"vs. {label}" for label in references)]
    rows = []
    for name in names:
        label = _label(name, results) + (" (its better layout)" if name == best else "")
        rows.append([label, f"{speeds[name]:,.0f}", *(_ratio(rounds, name, other) for other in references.values())])
        rows[-1] += _abilities(name)
    header += ["synchronized batch norm on a CPU", "bit-exact resume"]
    intro = f"improved_alexnet, CIFAR-10, batch 128, bfloat16 unless noted. {_measured(results, 'bench_train_cpu')}"
    return f"{paragraph(intro)}\n\n{table(header, rows)}"


def _abilities(name: str) -> list[str]:
    """Return the last cells of a row; empty for loops that neither save nor run on several processes."""
    if name.startswith("ours (fast)"):
        return ["yes", "on the same number of processes"]
    if name.startswith("ours"):
        return ["yes", "yes"]
    lacks = next((PEERS[key].lacks for key, start in PEER_NAMES.items() if name.startswith(start)), None)
    return (
        ["", ""]
        if lacks is None
        else ["no" if any(word in lack for lack in lacks) else "" for word in ("batch", "resume")]
    )


def _label(name: str, results: Results) -> str:
    for key, start in PEER_NAMES.items():
        if name.startswith(start):
            versions = results["machine"]["versions"]
            version = next((versions[p] for p in (key, f"pytorch-{key}") if p in versions), "")
            return f"{start.partition(' (')[0]} {version}, bfloat16, channels last"
    start, label = next(((start, label) for start, label in _LABELS.items() if re.match(start, name)), ("", ""))
    return label + re.sub(f"^{start}", "", name)


def _ratio(rounds: Sequence[Mapping[str, float]], name: str, other: str) -> str:
    """Return the median of the rounds' ratios; empty if no round has both."""
    ratios = [figures[name] / figures[other] for figures in rounds if {name, other} <= figures.keys()]
    return f"{median(ratios):.2f}" if ratios and name != other else "1" if name == other else ""


def train_gpu(content: Content) -> str:
    """Return the table of `bench train` on a GPU."""
    results = content["bench_train_gpu"]
    figures, failed = medians(results["rounds"]), results["failed"][0]
    batches = sorted({int(name.rpartition(", batch ")[2]) for name in figures})
    workloads = dict.fromkeys(name.rpartition(", batch ")[0] for name in figures)
    shown = [name for name in workloads if name.startswith(("ours", *PEER_NAMES.values()))]
    rows = [
        [
            _label(name, results).removesuffix(", 1 GPU"),
            *(_cell(figures, failed, f"{name}, batch {batch}") for batch in batches),
        ]
        for name in shown
    ]
    intro = (
        f"One {results['machine']['gpu']['card']}. {_measured(results, 'bench_train_gpu')} The complete table and how it was "
        "measured: [gpu.md](gpu.md#speed)."
    )
    return f"{paragraph(intro)}\n\n{table(['images/s', *(f'batch {batch}' for batch in batches)], rows)}"


def _cell(figures: Mapping[str, float], failed: Mapping[str, str], name: str) -> str:
    if name in figures:
        return f"{figures[name]:,.0f}"
    reason = failed.get(name, "")
    if re.match("ended after|ended by|not started", reason):  # by the time limit of the benchmark, not of the workload
        return "not measured"
    return "timed out" if reason.startswith("timed out") else "failed"


def exact_price(content: Content) -> str:
    """Return what exact mode costs, in a sentence per device."""
    ratios = content["bench_exact_cpu"]["ratios"]
    one = median(_named(ratios, r"1 process x 2 threads: exact, 8 shards / fast"))
    two = median(_named(ratios, r"2 processes x 1 thread: exact, 2 shards / fast"))
    measured = _measured(content["bench_exact_cpu"], "bench_exact_cpu")
    gpu = medians(content["bench_train_gpu"]["rounds"])
    fractions = [
        f"{gpu[exact] / value:.2f} at {name.rpartition(', ')[2]}"
        for name, value in gpu.items()
        if name.startswith("ours (fast), 1 GPU") and (exact := name.replace("(fast)", "(exact, 8 shards)")) in gpu
    ]
    cpu = (
        f"On a CPU a step of exact mode takes {two:.2f} times as long as one of fast mode with one shard on each of two "
        f"processes, and {one:.2f} times as long with 8 shards on one process. {measured} The table is in "
        "[exact.md](exact.md#what-it-costs)."
    )
    card = content["bench_train_gpu"]["machine"]["gpu"]["card"]
    device = f"On one {card} with 8 shards, exact mode has these fractions of fast mode's speed: {listed(fractions)}."
    return f"{paragraph(cpu)}\n\n{paragraph(device)}"


def scaling(content: Content) -> str:
    """Return the tables of `bench scaling`."""
    if "bench_scaling_cpu" not in content:
        return "Not measured yet on a quiet machine."
    results = content["bench_scaling_cpu"]
    text = scaling_report.report(
        results["rounds"], cores=results["machine"]["cores"], predicted_cores=scaling_report.PREDICTED_CORES
    )
    return f"{paragraph(_measured(results, 'bench_scaling_cpu'))}\n\n{text}"


def others(content: Content) -> str:
    """Return the table of startup, saves and layers."""
    startup, save, norm = (content[f"bench_{name}_cpu"] for name in ("startup", "save", "norm"))
    seconds = median(_named(startup["rounds"], "to the first step"))
    first, saves = _named(startup["ratios"], "first step"), _named(save["ratios"], "time a save adds")
    layer32, layer16 = (_named(norm["ratios"], f"torch's / ours, {dtype}") for dtype in ("float32", "bfloat16"))
    unclear = "too little to measure: " if min(saves) < 0 < max(saves) else ""
    started = f"{seconds:.1f} s: {median(first):.2f} times `import torch` plus a process group{_range(first, 2)}"
    rows = [
        ["from launch to the first step, 2 processes", started, _measured(startup, "bench_startup_cpu")],
        [
            "one save, written while training continues", f"{unclear}{median(saves):.2f} of a step{_range(saves, 1)}",
            _measured(save, "bench_save_cpu"),
        ],
        [
            "local response norm against torch's",
            f"{median(layer32):.1f} times as fast in float32{_range(layer32, 1)}, {median(layer16):.1f} times in bfloat16",
            _measured(norm, "bench_norm_cpu"),
        ],
    ]  # fmt: skip
    return table(["what", "figure", "measured"], rows)


def _measured(results: Results, file: str) -> str:
    """Describe machine, date and command of a measurement, with a link to its file."""
    machine, rounds = results["machine"], len(results["rounds"])
    command = f"{results['command']} --data.root FOLDER"
    return (
        f"{machine['cores']} cores ({machine['processor']}), torch {machine['versions']['torch']}, {machine['date']}, "
        f"{rounds} round{'s' if rounds > 1 else ''} of `{command}` ([raw](../results/{file}.json))."
    )


def _named(rounds: Sequence[Mapping[str, float]], start: str) -> list[float]:
    """Return the values whose name matches, in all rounds.

    Raises:
        InputError: there is none.
    """
    found = [value for figures in rounds for name, value in figures.items() if re.match(start, name)]
    if not found:
        raise InputError(f"page: results/ has no figure {start!r}; repeat the measurement")
    return found


def _range(values: Sequence[float], digits: int) -> str:
    return f" (rounds {min(values):.{digits}f} to {max(values):.{digits}f})"
