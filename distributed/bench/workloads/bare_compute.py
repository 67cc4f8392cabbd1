"""Compute alone: forward, backward and update on one fixed batch, with torch's own layers and no data loading."""

from collections.abc import Callable

import torch

from distributed.bench.measure import StepClock
from distributed.bench.workloads.task import plain_model, plain_sgd, use_device


def eager(clock: StepClock, *, batch: int, device: str, threads: int) -> None:
    """Launch every kernel of each step from Python."""
    step = _step(batch, use_device(device, threads))
    step()
    while not clock.tick():
        step()


def graph(clock: StepClock, *, batch: int, device: str, threads: int) -> None:
    """Capture a complete step, update included, as one CUDA graph and replay it."""
    step = _step(batch, use_device(device, threads))
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: cuDNN chooses algorithms, SGD creates its momentum buffers
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
    """Return a training step in bfloat16 and channels last, on images that already are on the device."""
    torch.backends.cudnn.benchmark = True
    model = plain_model().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = plain_sgd(model, fused=True)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        # Each weight is used once, so a cache of casts would save nothing, and within a graph it could outlive a replay.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
