"""What a benchmark was asked to measure, and on what."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from distributed.errors import InputError
from distributed.host.cpu_quota import available_cpus

IMAGES = 50_000  # of CIFAR-10's training split
CONTENDERS = {
    "compute": "forward, backward and update on one fixed batch",
    "graph": "the same, replayed as a CUDA graph",
    "ours": "fast mode",
    "exact": "exact mode, 8 shards",
    "seeds": "the seeds' plain loop",
    "timm": "timm's training loop",
    "lightning": "Lightning's Trainer",
}


@dataclass(frozen=True)
class Options:
    """The checked arguments of a benchmark.

    Args:
        gpus: number of CUDA devices to be seen; 0 measures the CPU.
        seconds: time limit of a contender, its start included; None: none.
        contenders: keys of CONTENDERS.
    """

    root: Path
    steps: int
    gpus: int = 0
    batches: tuple[int, ...] = (128,)
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    seconds: float | None = None

    @classmethod
    def of(cls, given: Namespace) -> "Options":
        """Check the command line's arguments and fill in what depends on the device.

        Raises:
            InputError: a value cannot be used, or there is no GPU for it.
        """
        gpus = _gpus(given.device)
        chosen = tuple(given.contenders or (name for name in CONTENDERS if gpus or name != "graph"))
        options = cls(
            root=given.root.resolve(),
            steps=given.steps if given.steps is not None else (100 if gpus else 80),
            gpus=gpus,
            batches=tuple(given.batches or ((128, 512, 2048) if gpus else (128,))),
            contenders=tuple(dict.fromkeys(chosen)),
            seconds=given.seconds if given.seconds is not None else (40.0 if gpus else None),
        )
        wrong = []
        if options.steps < 8:
            wrong.append(f"--steps {options.steps}: must be at least 8; the first quarter is warm-up")
        if given.rounds is not None and given.rounds < 1:
            wrong.append(f"--rounds {given.rounds}: at least 1")
        if bad := [batch for batch in options.batches if not 1 <= batch <= IMAGES]:
            wrong.append(f"--batches {' '.join(map(str, bad))}: each from 1 to the {IMAGES:,} training images")
        if options.seconds is not None and not options.seconds > 0:
            wrong.append(f"--seconds {options.seconds:g}: must be more than 0")
        if given.kind != "train" and (given.batches or given.contenders):
            wrong.append(f"--batches and --contenders: only for train, not for {given.kind}")
        if "graph" in options.contenders and not gpus:
            wrong.append("--contenders graph: CUDA graphs need --device cuda")
        if wrong:
            raise InputError(*wrong)
        return options

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def workers(self) -> int:
        """Loader processes of the peers: half of the cores, from 2 to 8."""
        return max(2, min(8, available_cpus() // 2))

    @property
    def threads(self) -> int:
        """CPU threads of a single process; 0: its own choice."""
        return 0 if self.gpus else 2

    def block(self, batch: int) -> int:
        """Steps between two readings of the clock: on a GPU up to 10, but few enough that an epoch's end falls into at most
        one block of five, and that there are four blocks. The median leaves the ends out."""
        return max(1, min(10, IMAGES // batch // 5, self.steps // 4)) if self.gpus else 1


def _gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        raise InputError("--device cuda: no CUDA device is to be seen; use --device cpu, or check nvidia-smi")
    return count
