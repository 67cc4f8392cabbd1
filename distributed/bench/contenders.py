"""Runs one contender in this process: `python -m distributed.bench.contenders MODULE:FUNCTION JSON_ARGUMENTS`.

Prints, on rank 0, one JSON line: the clock's readings (steps done, CLOCK_MONOTONIC, the same for all processes), and the most
memory it held in MiB: on CUDA of the device, by torch's count, else of the process.
"""

import json
import pkgutil
import resource
import sys
from typing import Any

from distributed.bench.clock import StepClock


def ours(clock: StepClock, *, arguments: list[str]) -> None:
    """`train(config)` as `python -m distributed.train ARGUMENTS` runs it, stopped after so many steps."""
    from distributed.config import from_command_line
    from distributed.process import logs
    from distributed.recipe import train
    from distributed.topology import Topology

    class Stop:
        """Stop source that ticks the clock: it is queried after every step."""

        def requested(self) -> str | None:
            return "the end of the measurement" if clock.tick() else None

    config = from_command_line(arguments).config
    logs.terminal_logs(Topology.from_environment().rank, level="WARNING")
    train(config, stop=Stop())


def process_group_alone(clock: StepClock) -> None:
    """`import torch` and a process group, the least that any distributed program starts with."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.zeros(1))
    clock.tick()
    dist.barrier()  # else a rank that leaves first can fail the other
    dist.destroy_process_group()


def local_response_norm(clock: StepClock, *, layer: str, precision: str, device: str) -> None:
    """Forward and backward of one layer. torch's knows no bfloat16 on a CPU, so that the cast to float32 and back is its
    part there, as it would be in a network; autocast casts for it on CUDA too."""
    import torch
    from torch import nn

    from distributed.models.local_response_norm import LocalResponseNorm

    dtype = getattr(torch, precision)
    images = torch.randn(128, 96, 28, 28, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(images)
    images.requires_grad_()
    norm: Any = (LocalResponseNorm if layer == "ours" else nn.LocalResponseNorm)(5, alpha=1e-4, beta=0.75, k=2.0)
    finished = False
    while not finished:
        images.grad = None
        norm(images if layer == "ours" else images.float()).to(dtype).backward(grad)
        finished = clock.tick()


def main() -> None:
    from distributed.topology import Topology

    arguments = json.loads(sys.argv[2])
    clock = StepClock(**arguments["clock"])
    pkgutil.resolve_name(sys.argv[1])(clock, **arguments["settings"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if clock.device == "cuda":
        import torch

        memory = torch.cuda.max_memory_allocated() / 2**20
    if Topology.from_environment().is_main:
        print("CLOCK", json.dumps([clock.readings, memory]), flush=True)


if __name__ == "__main__":
    main()
