"""Compute alone: forward, backward and update on one fixed batch, with torch's own layers; what no data costs."""

from collections.abc import Callable

import torch

from distributed.bench.clock import StepClock
from distributed.bench.workload import plain_model, plain_sgd, prepare


def eager(clock: StepClock, *, batch: int, device: str, threads: int) -> None:
    """Launch every kernel of each step from Python."""
    step = _step(batch, prepare(device, threads))
    step()
    while not clock.tick():
        step()


def graph(clock: StepClock, *, batch: int, device: str, threads: int) -> None:
    """Capture one whole step, the update included, as a CUDA graph and replay it."""
    step = _step(batch, prepare(device, threads))
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: cuDNN chooses its algorithms, the momentum is made
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    captured.replay()
    while not clock.tick():
        captured.replay()


def _step(batch: int, device: torch.device) -> Callable[[], None]:
    """One training step in bfloat16 and channels last on images that are on the device already."""
    torch.backends.cudnn.benchmark = True
    model = plain_model().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = plain_sgd(model, fused=True)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        # Each weight is used once, so that a cache of casts would save nothing, and in a graph it could outlive a replay.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
