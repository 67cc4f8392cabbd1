"""Determinism: the switches for reproducible results, and the metadata of a machine that selects its kernels."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.backends import cuda

from distributed.errors import InputError, first_few
from distributed.host.hardware import c_library, instructions, math_libraries, processor, processor_model
from distributed.topology import kernel_variables

_DRIVER = Path("/sys/module/nvidia/version")


_ATTENTION: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
"""Kernels of scaled_dot_product_attention whose backward passes add in any order: how to read and set their switches."""

cudnn: Any = torch.backends.cudnn  # their types lack what they have
mkldnn: Any = torch.backends.mkldnn
_DEFAULT: Any = torch.backends
_PARTS: tuple[Any, ...] = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
"""The parts that have an `fp32_precision` of their own; if it is "none", that of their backend applies, then `_DEFAULT`'s."""


@contextmanager
def restored_settings() -> Iterator[None]:
    """Restore torch's threads and the switches of `make_deterministic` at the end. Context manager.

    Variables of the environment, which CUDA's libraries read once, stay.
    """
    threads = torch.get_num_threads()
    switches = cudnn.deterministic, cudnn.benchmark, mkldnn.enabled
    inductor_deterministic = getattr(sys.modules.get("torch._inductor.config"), "deterministic", False)
    recompile_limit = getattr(sys.modules.get("torch._dynamo.config"), "recompile_limit", 8)  # 8 is torch's default
    fast_path = torch.backends.mha.get_fastpath_enabled()
    attention = [is_enabled() for is_enabled, _ in _ATTENTION]
    try:
        with _restored_float32():
            yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark, mkldnn.enabled = switches
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for (_, enable), enabled in zip(_ATTENTION, attention, strict=True):
            enable(enabled)
        if inductor := sys.modules.get("torch._inductor.config"):
            inductor.deterministic = inductor_deterministic  # type: ignore[attr-defined]
        if dynamo := sys.modules.get("torch._dynamo.config"):
            dynamo.recompile_limit = recompile_limit  # type: ignore[attr-defined]


@contextmanager
def _restored_float32() -> Iterator[None]:
    """Restore how float32 is computed. Context manager."""
    # While the backends are at "none", reading a part gives its own value, not one that it inherits.
    default, _DEFAULT.fp32_precision = _DEFAULT.fp32_precision, "none"
    of_cudnn, cudnn.fp32_precision = cudnn.fp32_precision, "none"
    own = [part.fp32_precision for part in _PARTS]
    _DEFAULT.fp32_precision, cudnn.fp32_precision = default, of_cudnn
    matmul_precision, cudnn_tf32 = "highest", True
    with suppress(RuntimeError):  # older switches cannot be read once a script has set `fp32_precision` too
        matmul_precision = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn_tf32 = cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
        cudnn.allow_tf32 = cudnn_tf32
        _DEFAULT.fp32_precision, cudnn.fp32_precision = default, of_cudnn
        for part, precision in zip(_PARTS, own, strict=True):
            part.fp32_precision = precision


def make_deterministic(device: torch.device, *, precision: str, compile: bool = False) -> None:
    """Make results bit-reproducible on one kind of device, and forbid TF32 unless `precision` is tf32.

    What a script or notebook has set before must not affect the results.

    Raises:
        InputError: `precision` is tf32 and the device is not a GPU.
    """
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision = tf32 needs CUDA, but the device is {device.type}: use float32")
    # In evaluation a TransformerEncoderLayer would take fused kernels unless it has hooks, e.g. those of sharded weights.
    torch.backends.mha.set_fastpath_enabled(False)
    mkldnn.enabled = True
    torch.set_float32_matmul_precision("highest")
    for part in (_DEFAULT, *_PARTS):
        part.fp32_precision = "ieee"
    # By default torch computes float32 convolutions on CUDA in TF32, whose mantissa has 10 bits.
    cudnn.allow_tf32 = cuda.matmul.allow_tf32 = precision == "tf32"
    # The switches above may leave "none" in these, where cudnn.fp32_precision counts.
    for part in (cuda.matmul, cudnn.conv, cudnn.rnn):
        part.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    if device.type != "cuda":
        return
    # Read at the first cuBLAS call. https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    cudnn.deterministic, cudnn.benchmark = True, False
    for _, enable in _ATTENTION:
        enable(False)
    if compile:
        from torch._inductor import config as inductor  # slow to import

        # Otherwise each process autotunes its reductions by timing them.
        inductor.deterministic = True


def kernel_metadata(device: torch.device) -> dict[str, str]:
    """Return the hardware, libraries and environment variables that select this rank's kernels, by readable names."""
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


class MergedMetadata(NamedTuple):
    """The kernel metadata of all ranks."""

    values: dict[str, str]
    """Per key the ranks' values; several are joined by " / "."""
    differences: list[str]
    """One line per key whose value differs between ranks."""


def merge_metadata(ranks: Sequence[Mapping[str, str]]) -> MergedMetadata:
    """Merge the kernel metadata of all ranks, given in order of rank."""
    merged, differences = dict[str, str](), list[str]()
    for name in sorted({name for metadata in ranks for name in metadata}):
        values = [metadata.get(name, "not set") for metadata in ranks]
        merged[name] = " / ".join(sorted(set(values)))
        if len(set(values)) > 1:
            each = "; ".join(f"{value} on rank {_ranks_with(value, values)}" for value in dict.fromkeys(values))
            differences.append(f"{name}: {each}")
    return MergedMetadata(merged, differences)


def _ranks_with(value: str, values: Sequence[str]) -> str:
    ranks = [str(rank) for rank, other in enumerate(values) if other == value]
    return first_few(ranks, 8)
