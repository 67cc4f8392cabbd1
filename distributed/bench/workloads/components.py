"""Workloads smaller than training: a process group alone, one layer alone."""

from typing import Any

from distributed.bench.measure import StepClock


def process_group_alone(clock: StepClock) -> None:
    """Import torch and start a process group, the minimum that any distributed program does."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.zeros(1))
    clock.tick()
    dist.barrier()  # a rank that leaves first could make the other fail
    dist.destroy_process_group()


def local_response_norm(clock: StepClock, *, layer: str, precision: str, device: str) -> None:
    """Run the forward and backward pass of one layer on [128, 96, 28, 28] images.

    torch's layer does not support bfloat16 on a CPU, so its time includes the casts to float32 and back, as it would in a
    network; on CUDA autocast casts too.
    """
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
