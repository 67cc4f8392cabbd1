"""`bench train`: training speed of this project, of compute alone and of other training loops, on the same work.

Improved AlexNet on CIFAR-10, SGD with Nesterov momentum, random crop and flip; all on the same device with the same batch.
"""

from importlib.util import find_spec
from typing import Any

from distributed.bench.options import IMAGES, Options
from distributed.bench.rounds import Contender

MODES = {"ours": ("fast", "0"), "exact": ("exact, 8 shards", "8")}
PACKAGES = {"timm": ("timm",), "lightning": ("pytorch_lightning", "lightning")}
"""For each peer, the modules of which at least one must be installed."""


def ours(options: Options, run_dir: str, *more: str, **fields: Any) -> Contender:
    """This project's training.

    Args:
        more: settings of the command line.
        fields: other fields of the Contender; `threads` a rank, which are the cores' share if not given.
    """
    batch, steps = fields.setdefault("batch", 128), fields.setdefault("steps", options.steps)
    threads = fields.pop("threads", options.threads)
    epochs = max(20, 2 + steps * batch // IMAGES)  # more than are measured: the end of a run tests and saves
    settings = {
        "data.name": "cifar10", "data.root": options.root, "data.validation_fraction": 0, "run_dir": run_dir,
        "epochs": epochs, "global_batch_size": batch, "device": options.device, "threads": threads,
        "evaluation.test_every_epoch": "false", "checkpoint.every_minutes": 0,
    }  # fmt: skip
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    fields |= {"device": options.device, "block": options.block(batch)}
    return Contender("distributed.bench.contenders:ours", {"arguments": [*arguments, *more]}, **fields)


def compute_alone(options: Options, batch: int = 128, *, graph: bool = False) -> Contender:
    """Forward, backward and update on one fixed batch."""
    settings = {"batch": batch, "device": options.device, "threads": options.threads}
    return _other(options, f"distributed.bench.compute:{'graph' if graph else 'eager'}", settings)


def layouts(options: Options) -> dict[str, tuple[int, int]]:
    """How ours is laid out, as name: (torchrun ranks, CPU threads each). Ranks never share a GPU."""
    if not options.gpus:
        return {"1 process x 2 threads": (0, 2), "2 processes x 1 thread": (2, 1)}
    several = {f"{options.gpus} GPUs": (options.gpus, 0)} if options.gpus > 1 else {}
    return {"1 GPU": (0, 0), **several}


def contenders(options: Options, folder: str) -> dict[str, Contender]:
    """Every contender by name, batch after batch; those whose package is not installed are left out."""
    found: dict[str, Contender] = {}
    for batch in options.batches:
        for key in options.contenders:
            if key not in skipped(options):
                named = _contenders_of(key, options, batch, f"{folder}/{key}-{batch}")
                found |= {f"{name}, batch {batch}": contender for name, contender in named.items()}
    return found


def skipped(options: Options) -> dict[str, str]:
    """Chosen contenders that cannot run here, and why."""
    return {
        key: "not installed"
        for key, modules in PACKAGES.items()
        if key in options.contenders and not any(map(find_spec, modules))
    }


def _contenders_of(key: str, options: Options, batch: int, folder: str) -> dict[str, Contender]:
    settings = {"root": str(options.root), "batch": batch, "device": options.device, "threads": options.threads}
    peer = settings | {"workers": options.workers}
    match key:
        case "compute":
            return {"compute alone": compute_alone(options, batch)}
        case "graph":
            return {"compute alone (CUDA graph)": compute_alone(options, batch, graph=True)}
        case "seeds":
            precision = " (float32, TF32 off)" if options.gpus else ""
            return {f"seeds' plain loop{precision}": _other(options, "distributed.bench.seed_loop:run", settings)}
        case "timm":
            return {"timm (bfloat16)": _other(options, "distributed.bench.peers.timm_loop:run", peer)}
        case "lightning":
            return {"Lightning (bfloat16)": _other(options, "distributed.bench.peers.lightning_loop:run", peer)}
    mode, shards = MODES[key]
    return {
        f"ours ({mode}), {where}": ours(
            options, f"{folder}-{ranks}", "--exact.shards", shards, batch=batch, ranks=ranks, threads=threads
        )
        for where, (ranks, threads) in layouts(options).items()
    }


def _other(options: Options, function: str, settings: dict[str, Any]) -> Contender:
    batch = settings["batch"]
    return Contender(function, settings, options.steps, options.device, options.block(batch), batch)


def ratios(r: dict[str, float]) -> dict[str, float]:
    """Ours over each other contender of the same batch."""
    found: dict[str, float] = {}
    for name, value in r.items():
        mode, _, batch = name.rpartition(", ")
        if mode.startswith("ours "):
            others = [other for other in r if other.endswith(f", {batch}") and not other.startswith("ours ")]
            found |= {f"{name} / {other.rpartition(', ')[0]}": value / r[other] for other in others}
    return found
