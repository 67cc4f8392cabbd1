"""Determinism: switches that make results reproducible, and the metadata that selects kernels."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from distributed.errors import InputError
from distributed.host.hardware import c_library, instructions, math_libraries, processor, processor_model
from distributed.topology import kernel_variables

_DRIVER = Path("/sys/module/nvidia/version")


def make_deterministic(device: torch.device, *, precision: str, compile: bool = False) -> None:
    """Let the same inputs give the same bits on one kind of device, and float32 mean float32.

    Raises:
        InputError: TF32 was asked for on a device that does not have it.
    """
    if device.type != "cuda":
        if precision == "tf32":
            raise InputError(f"precision = tf32 needs CUDA, but the device is {device.type}: use float32")
        return
    # Read at the first cuBLAS call. https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # torch allows TF32, with 10 bits of mantissa, in float32 convolutions unless it is forbidden.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if compile:
        from torch._inductor import config as inductor  # slow to import

        # Else each process times several ways to sum, and takes the one that was fastest there.
        inductor.deterministic = True


def kernels(device: torch.device) -> dict[str, str]:
    """What selects this rank's kernels, by readable names: hardware, libraries, environment variables."""
    if device.type != "cuda":
        return {
            "device": processor(),
            "processor": processor_model(),
            "instructions": instructions(),
            "ATen's CPU capability": torch.backends.cpu.get_cpu_capability(),
            "C library": c_library(),
            "other math libraries": math_libraries() or "none",
        } | kernel_variables()
    card = torch.cuda.get_device_properties(device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {
        "device": card.name,
        "compute capability": f"{card.major}.{card.minor}",
        "multiprocessors": str(card.multi_processor_count),
        "driver": _DRIVER.read_text().strip() if _DRIVER.is_file() else "unknown",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "NCCL": nccl,
    } | kernel_variables()


def joined(of_ranks: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The kernel metadata of all ranks merged, and one line per key in which ranks differ."""
    together, differences = {}, []
    for name in sorted({name for facts in of_ranks for name in facts}):
        values = [facts.get(name, "not set") for facts in of_ranks]
        together[name] = " / ".join(sorted(set(values)))
        if len(set(values)) > 1:
            who = "; ".join(f"{value} on rank {_ranks(values, value)}" for value in dict.fromkeys(values))
            differences.append(f"{name}: {who}")
    return together, differences


def _ranks(values: Sequence[str], wanted: str) -> str:
    found = [str(rank) for rank, value in enumerate(values) if value == wanted]
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if found[8:] else "")
