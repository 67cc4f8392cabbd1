"""The command line of torchrun, for commands that start their own ranks. Imports no torch."""

import sys
from collections.abc import Sequence


def torchrun_command(
    processes: int | str, module: str, arguments: Sequence[str] = (), *, options: Sequence[str] = ("--standalone",)
) -> list[str]:
    """Return `torchrun --nproc_per_node=PROCESSES OPTIONS -m MODULE ARGUMENTS`, run by this Python.

    Args:
        options: further options of torchrun; by default, a rendezvous on a free port of this machine.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *options]
    return [*launcher, "-m", module, *arguments]
