"""`bench train`: training speed of this project, of compute alone and of other training loops on the same task.

The task is improved AlexNet on CIFAR-10, SGD with Nesterov momentum, random crop and flip, on the same device and with the
same batch size for all.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from distributed.bench.options import IMAGES, Options
from distributed.bench.workload import Workload

MODULES = "distributed.bench.workloads"
MODES = {"ours": ("fast", "0"), "exact": ("exact, 8 shards", "8")}
PEER_NAMES = {"timm": "timm (bfloat16)", "accelerate": "accelerate (bfloat16)", "lightning": "Lightning (bfloat16)"}
DEFAULT = "ours (default)"


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
    batch, steps = fields.pop("batch", 128), fields.setdefault("steps", options.steps)
    threads = fields.pop("threads", options.threads)
    epochs = max(20, 2 + steps * batch // IMAGES)  # never reached: the end of a run would evaluate and save
    values = {
        "data.name": "cifar10", "data.root": options.root, "data.validation_fraction": 0, "run_dir": run_dir,
        "precision": "bfloat16", "epochs": epochs, "global_batch_size": batch, "device": options.device, "threads": threads,
        "evaluation.test_every_epoch": "false", "checkpoint.every_minutes": 0,
    }  # fmt: skip
    arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    # The mean step on a GPU includes the last one of an epoch, which trains on what is left. The median on a CPU does not.
    images = IMAGES / math.ceil(IMAGES / batch) if options.gpus else batch
    fields |= {"device": options.device, "block": options.block, "batch": images}
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
    """Return the chosen workloads by name, batch size by batch size."""
    found: dict[str, Workload] = {}
    for batch in options.batches:
        for key in options.workloads:
            named = _workloads_of(key, options, batch, f"{folder}/{key}-{batch}")
            found |= {f"{name}, batch {batch}": workload for name, workload in named.items()}
    return found


def _workloads_of(key: str, options: Options, batch: int, folder: str) -> dict[str, Workload]:
    settings = {"root": str(options.root), "batch": batch, "device": options.device, "threads": options.threads}
    match key:
        case "compute":
            return {"compute alone": compute_alone(options, batch)}
        case "graph":
            return {"compute alone (CUDA graph)": compute_alone(options, batch, graph=True)}
        case "seeds":
            precision = " (float32, TF32 off)" if options.gpus else ""
            return {f"references' plain loop{precision}": _other(options, "reference_loop:run", settings)}
        case "timm" | "accelerate" | "lightning":
            workload = _other(options, f"{key}_loop:run", settings | {"workers": options.workers})
            return {PEER_NAMES[key]: replace(workload, python=options.peer_python)}
        case "default":  # as `make train` runs it on a CPU: no setting for threads or shards
            return {f"{DEFAULT}, 2 processes": ours(options, folder, batch=batch, ranks=2, threads=0)}
    mode, shards = MODES[key]
    return {
        f"ours ({mode}), {name}": ours(
            options, f"{folder}-{ranks}", "--exact.shards", shards, batch=batch, ranks=ranks, threads=threads
        )
        for name, (ranks, threads) in layouts(options).items()
    }


def _other(options: Options, function: str, settings: dict[str, Any]) -> Workload:
    batch = settings["batch"]
    return Workload(f"{MODULES}.{function}", settings, options.steps, options.device, options.block, batch)


def ratios(figures: dict[str, float]) -> dict[str, float]:
    """Return the speed of this project relative to each other workload of the same batch size."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        workload, _, batch = name.rpartition(", ")
        if workload.startswith("ours ") and not workload.endswith(" GPUs"):  # the others use one
            others = [other for other in figures if other.endswith(f", {batch}") and not other.startswith("ours ")]
            found |= {f"{name} / {other.rpartition(', ')[0]}": value / figures[other] for other in others}
    return found
