"""Lists the steps in the order they run, with their time limits. Run as a module, it runs one step in this process."""

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """A module with a function `run(checks)`; the default is the module of this package with the step's name.

    Args:
        seconds: time limit.
        proves: a phrase on what the step shows.
    """

    name: str
    seconds: int
    proves: str
    module: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or f"distributed.gpu_check.{self.name}")


STEPS = (
    Step("environment", 30, "versions, card, packages, disk"),
    Step("ceilings", 30, "copy bandwidth, matrix products, launch times, gloo latency"),
    Step("units", 60, "tensor functions equal the CPU's; batch norm, response norm and totals against float64"),
    Step("networks", 70, "steps of each network and precision: no waits, deterministic, close to float64"),
    Step("resume", 60, "stop, kill -9 and resume to the same bits; a GPU checkpoint evaluated on the CPU"),
    Step("ranks", 90, "several ranks on one GPU over gloo: fast mode, exact mode, ddp and fsdp"),
    Step("nccl", 45, "NCCL with one rank: ddp, fsdp and exact mode; collectives inside a CUDA graph"),
    Step("invariance", 45, "kernels that give a shard the same bits regardless of the other rows"),
    Step("speed", 130, "step times by batch size, network and mode; a profile"),
)


def main() -> None:
    """Run one step: MODULE DEVICE TINY(0|1) OUT."""
    module, device, tiny, out = sys.argv[1:]
    import torch

    from distributed.gpu_check.checks import Checks

    if tiny == "1":
        torch.set_num_threads(1)  # on small shapes threads mostly wait for each other
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        checks = Checks(torch.device(device), tiny == "1", Path(scratch), Path(out))
        importlib.import_module(module).run(checks)


if __name__ == "__main__":
    main()
