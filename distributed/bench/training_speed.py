"""`bench train`: training speed of this project, of compute alone and of other training loops on the same task.

The task is improved AlexNet on CIFAR-10, SGD with Nesterov momentum, random crop and flip, on the same device and with the
same batch size for all.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

from distributed.bench.options import IMAGES, Options
from distributed.bench.workload import Workload

MODULES = "distributed.bench.workloads"
MODES = {"ours": ("fast", "0"), "exact": ("exact, 8 shards", "8")}
PACKAGES = {"timm": ("timm",), "lightning": ("pytorch_lightning", "lightning")}
"""Modules that a workload needs; at least one of them must be installed."""


class Layout(NamedTuple):
    """Processes of a run, and CPU threads per process (0: the default). Without torchrun `ranks` is 0."""

    ranks: int
    threads: int


def ours(options: Options, run_dir: str, *settings: str, **fields: Any) -> Workload:
    """Return the workload of training with this project.

    Args:
        settings: further settings of the command line.
        fields: further fields of the Workload, and `threads` per rank (default: `options.threads`).
    """
    batch, steps = fields.setdefault("batch", 128), fields.setdefault("steps", options.steps)
    threads = fields.pop("threads", options.threads)
    epochs = max(20, 2 + steps * batch // IMAGES)  # never reached: the end of a run would evaluate and save
    values = {
        "data.name": "cifar10", "data.root": options.root, "data.validation_fraction": 0, "run_dir": run_dir,
        "epochs": epochs, "global_batch_size": batch, "device": options.device, "threads": threads,
        "evaluation.test_every_epoch": "false", "checkpoint.every_minutes": 0,
    }  # fmt: skip
    arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    fields |= {"device": options.device, "block": options.block(batch)}
    return Workload(f"{MODULES}.this_project:run", {"arguments": [*arguments, *settings]}, **fields)


def compute_alone(options: Options, batch: int = 128, *, graph: bool = False) -> Workload:
    """Return the workload of forward, backward and update on one fixed batch."""
    settings = {"batch": batch, "device": options.device, "threads": options.threads}
    return _other(options, f"bare_compute:{'graph' if graph else 'eager'}", settings)


def layouts(options: Options) -> dict[str, Layout]:
    """Return the layouts in which this project is measured, by name. Ranks never share a GPU."""
    if not options.gpus:
        return {"1 process x 2 threads": Layout(0, 2), "2 processes x 1 thread": Layout(2, 1)}
    several = {f"{options.gpus} GPUs": Layout(options.gpus, 0)} if options.gpus > 1 else {}
    return {"1 GPU": Layout(0, 0), **several}


def workloads(options: Options, folder: str) -> dict[str, Workload]:
    """Return the chosen workloads by name, batch size by batch size, without those whose package is not installed."""
    found: dict[str, Workload] = {}
    for batch in options.batches:
        for key in options.workloads:
            if key not in skipped(options):
                named = _workloads_of(key, options, batch, f"{folder}/{key}-{batch}")
                found |= {f"{name}, batch {batch}": workload for name, workload in named.items()}
    return found


def skipped(options: Options) -> dict[str, str]:
    """Return the chosen workloads that cannot run here, each with the reason."""
    return {
        key: "not installed"
        for key, modules in PACKAGES.items()
        if key in options.workloads and not any(map(find_spec, modules))
    }


def _workloads_of(key: str, options: Options, batch: int, folder: str) -> dict[str, Workload]:
    settings = {"root": str(options.root), "batch": batch, "device": options.device, "threads": options.threads}
    with_workers = settings | {"workers": options.workers}
    match key:
        case "compute":
            return {"compute alone": compute_alone(options, batch)}
        case "graph":
            return {"compute alone (CUDA graph)": compute_alone(options, batch, graph=True)}
        case "seeds":
            precision = " (float32, TF32 off)" if options.gpus else ""
            return {f"references' plain loop{precision}": _other(options, "reference_loop:run", settings)}
        case "timm":
            return {"timm (bfloat16)": _other(options, "timm_loop:run", with_workers)}
        case "lightning":
            return {"Lightning (bfloat16)": _other(options, "lightning_loop:run", with_workers)}
    mode, shards = MODES[key]
    return {
        f"ours ({mode}), {name}": ours(
            options, f"{folder}-{ranks}", "--exact.shards", shards, batch=batch, ranks=ranks, threads=threads
        )
        for name, (ranks, threads) in layouts(options).items()
    }


def _other(options: Options, function: str, settings: dict[str, Any]) -> Workload:
    batch = settings["batch"]
    return Workload(f"{MODULES}.{function}", settings, options.steps, options.device, options.block(batch), batch)


def ratios(figures: dict[str, float]) -> dict[str, float]:
    """Return the speed of this project relative to each other workload of the same batch size."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        workload, _, batch = name.rpartition(", ")
        if workload.startswith("ours "):
            others = [other for other in figures if other.endswith(f", {batch}") and not other.startswith("ours ")]
            found |= {f"{name} / {other.rpartition(', ')[0]}": value / figures[other] for other in others}
    return found
