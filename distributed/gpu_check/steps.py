"""Lists the steps in the order they run, with their time limits. Run as a module, it runs one step in this process."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """A module with a function `run(checks)`; the default is the module of this package with the step's name.

    Args:
        seconds: time limit.
    """

    name: str
    seconds: int
    module: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or f"distributed.gpu_check.{self.name}")


STEPS = (
    Step("environment", 30),
    Step("ceilings", 30),
    Step("units", 60),
    Step("networks", 70),
    Step("resume", 60),
    Step("ranks", 90),
    Step("nccl", 45),
    Step("invariance", 45),
    Step("speed", 130),
)


def main() -> None:
    """Run one step: MODULE DEVICE TINY(0|1) OUT SCRATCH."""
    module, device, tiny, out, scratch = sys.argv[1:]
    import torch

    from distributed.gpu_check.checks import Checks

    if tiny == "1":
        torch.set_num_threads(1)  # on small shapes threads mostly wait for each other
    checks = Checks(torch.device(device), tiny == "1", Path(scratch), Path(out))
    importlib.import_module(module).run(checks)


if __name__ == "__main__":
    main()
