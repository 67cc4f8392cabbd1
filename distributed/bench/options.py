"""The checked arguments of a benchmark."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from distributed.bench.peers import DEFAULT_PEERS, PEERS
from distributed.errors import InputError, counted
from distributed.host.cpu_quota import available_cpus

IMAGES = 50_000  # in the training split of CIFAR-10, and of CIFAR-100
NETWORK = "improved_alexnet"
WORKLOADS = {
    "compute": "forward, backward and update on one fixed batch",
    "graph": "the same, replayed as a CUDA graph",
    "ours": "this project in fast mode",
    "exact": "this project in exact mode, 8 shards",
    "default": "this project as `make train` runs it",
    "seeds": "the training loop of the two reference implementations",
    "timm": "timm's training loop",
    "accelerate": "a loop with accelerate",
    "lightning": "Lightning's Trainer",
}
"""The workloads of `bench train`, by the names that `--workloads` accepts."""
GPU_ONLY, CPU_ONLY = ("graph",), ("default",)


@dataclass(frozen=True)
class Options:
    """The options of a benchmark, with defaults filled in.

    Args:
        root: folder with CIFAR-10.
        steps: steps to measure per workload and round.
        gpus: number of visible CUDA devices; 0: measure on the CPU.
        batches: batch sizes of `bench train`.
        workloads: keys of WORKLOADS.
        seconds: time limit of a workload, including its startup; None: no limit.
        network: the `model.name` of `bench exact`.
        peers: folder of the environment with the other frameworks; None: without them.
        peer_python: the Python that runs them.
        processes: those of this project in `bench accuracy`.
    """

    root: Path
    steps: int
    gpus: int = 0
    batches: tuple[int, ...] = (128,)
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    seconds: float | None = None
    network: str = NETWORK
    peers: Path | None = None
    peer_python: Path = Path(sys.executable)
    processes: int = 1

    @classmethod
    def of(cls, arguments: Namespace) -> "Options":
        """Check the command line's arguments, and fill in defaults, which depend on the device.

        Raises:
            InputError: a value is invalid, or a GPU is required and none is visible.
        """
        if arguments.benchmark == "scaling" and arguments.device == "cuda":
            raise InputError("--device cuda: scaling measures processes on the CPU; use --device cpu")
        gpus = _visible_gpus("cpu" if arguments.benchmark == "scaling" else arguments.device)
        chosen = arguments.workloads or [name for name in WORKLOADS if name not in (CPU_ONLY if gpus else GPU_ONLY)]
        if not (arguments.workloads or arguments.peers):
            chosen = [name for name in chosen if name not in PEERS]
        options = cls(
            root=arguments.root.resolve(),
            steps=arguments.steps if arguments.steps is not None else _default_steps(arguments.benchmark, gpus),
            gpus=gpus,
            batches=tuple(arguments.batches or ((128, 512, 2048) if gpus else (128,))),
            workloads=tuple(dict.fromkeys(chosen)),
            seconds=arguments.seconds if arguments.seconds is not None else _default_seconds(arguments.benchmark, gpus),
            network=arguments.network,
            peers=arguments.peers,
            processes=arguments.processes if arguments.processes is not None else _default_processes(arguments, gpus),
        )
        if wrong := [*options._invalid(), *_invalid(arguments)]:
            raise InputError(*wrong)
        return options

    def _invalid(self) -> list[str]:
        wrong = []
        if self.steps < 8:
            wrong.append(f"--steps {self.steps}: must be at least 8; the first quarter is warm-up")
        if bad := [batch for batch in self.batches if not 1 <= batch <= IMAGES]:
            wrong.append(f"--batches {' '.join(map(str, bad))}: each must be from 1 to {IMAGES:,}, the training images")
        if self.seconds is not None and not self.seconds > 0:
            wrong.append(f"--seconds {self.seconds:g}: must be greater than 0")
        if "graph" in self.workloads and not self.gpus:
            wrong.append("--workloads graph: CUDA graphs need --device cuda")
        if "default" in self.workloads and self.gpus:
            wrong.append("--workloads default: on CUDA the default is fast mode: --workloads ours")
        most = 1 if self.gpus else self.threads
        if self.peers and self.processes > most:
            of_timm = counted(most, "GPU" if self.gpus else "thread")
            wrong.append(f"--processes {self.processes}: timm has {of_timm}; use at most {most}, or --no-peers")
        if self.peers is None and (named := self.chosen_peers):
            wrong.append(f"--no-peers: contradicts --workloads {' '.join(named)}")
        return wrong

    @property
    def chosen_peers(self) -> list[str]:
        return [name for name in self.workloads if name in PEERS]

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def workers(self) -> int:
        """Loader processes of the other frameworks: half of the cores, from 2 to 8."""
        return max(2, min(8, available_cpus() // 2))

    @property
    def threads(self) -> int:
        """CPU threads of a single process; 0: the framework's default."""
        return 0 if self.gpus else 2

    @property
    def block(self) -> int:
        """Number of steps between two readings of the clock: 1 on a CPU; on a GPU at most 10, with at least eight blocks."""
        return max(1, min(10, self.steps // 8)) if self.gpus else 1


def _invalid(arguments: Namespace) -> list[str]:
    wrong = []
    if arguments.rounds is not None and arguments.rounds < 1:
        wrong.append(f"--rounds {arguments.rounds}: must be at least 1")
    if bad := [cores for cores in arguments.cores or () if cores < 1]:
        wrong.append(f"--cores {' '.join(map(str, bad))}: each must be at least 1")
    if arguments.benchmark != "exact" and arguments.network != NETWORK:
        wrong.append(f"--network: applies to exact only, not to {arguments.benchmark}")
    if arguments.benchmark != "scaling" and (arguments.cores or arguments.from_file):
        wrong.append(f"--cores and --from: apply to scaling only, not to {arguments.benchmark}")
    if arguments.benchmark == "accuracy" and (arguments.rounds is not None or arguments.steps is not None):
        wrong.append("--rounds and --steps: do not apply to accuracy; use --seeds and --epochs")
    own = (arguments.config, arguments.seeds, arguments.epochs, arguments.processes)
    if arguments.benchmark != "accuracy" and any(value is not None for value in own):
        names = "--config, --seeds, --epochs and --processes"
        wrong.append(f"{names}: apply to accuracy only, not to {arguments.benchmark}")
    if arguments.processes is not None and arguments.processes < 1:
        wrong.append(f"--processes {arguments.processes}: must be at least 1")
    if bad := [seed for seed in arguments.seeds or () if seed < 0]:
        wrong.append(f"--seeds {' '.join(map(str, bad))}: each must be at least 0")
    if arguments.benchmark not in ("train", "accuracy") and arguments.peers != DEFAULT_PEERS:
        wrong.append(f"--peers and --no-peers: apply to train and accuracy only, not to {arguments.benchmark}")
    if arguments.benchmark == "startup" and arguments.steps is not None:
        wrong.append("--steps: does not apply to startup, which takes one step")
    if arguments.benchmark != "train" and (arguments.batches or arguments.workloads):
        wrong.append(f"--batches and --workloads: apply to train only, not to {arguments.benchmark}")
    return wrong


def _default_steps(benchmark: str, gpus: int) -> int:
    return 100 if gpus else 40 if benchmark == "scaling" else 80


def _default_processes(arguments: Namespace, gpus: int) -> int:
    """Return as many as timm has, which runs on one GPU; on a CPU two, of one thread each, against its two threads."""
    return 1 if gpus and arguments.peers else gpus or 2


def _default_seconds(benchmark: str, gpus: int) -> float | None:
    """Return the time limit of a workload; a training to its end has none."""
    return 40.0 if gpus and benchmark != "accuracy" else None


def _visible_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        raise InputError("--device cuda: no CUDA device is visible; use --device cpu, or check nvidia-smi")
    return count
