"""Resolves `precision = auto`, and knows which precisions are slow on a device."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from distributed.comm import collectives
from distributed.config import TrainConfig, with_values
from distributed.errors import InputError
from distributed.host.hardware import multiplies_bfloat16

_NAMED_AT_START = ("float64", "tf32")
"""Precisions that apply to the data, or to how kernels are selected."""


def with_precision(
    config: TrainConfig, device: torch.device, saved_content: Callable[[TrainConfig], dict[str, Any] | None]
) -> TrainConfig:
    """Return the config with `precision = auto` resolved, to the same on all ranks. A collective.

    A run that has saved keeps its precision. A new one computes in bfloat16 if the devices of all ranks have instructions
    for it, else in float32.

    Args:
        saved_content: reads the content of the run's newest state.json, on rank 0; None if the run has not saved.

    Raises:
        InputError: the run has saved in a precision that has to be known before its data are read, or that does not fit the
            config.
    """
    if config.precision != "auto":
        return config
    saved = collectives.run_on_main(lambda: _saved_precision(saved_content(config)))
    if saved in _NAMED_AT_START:
        raise InputError(f"precision = auto: this run computes in {saved}; resume it with --precision {saved}")
    of_ranks = set(collectives.gather_objects(fast_precision(device)))
    precision = saved or ("bfloat16" if of_ranks == {"bfloat16"} else "float32")
    return with_values(config, precision=precision)


def _saved_precision(content: dict[str, Any] | None) -> Any:
    saved: Any = (content or {}).get("config")
    return saved.get("precision") if isinstance(saved, dict) else None


def fast_precision(device: torch.device) -> Literal["bfloat16", "float32"]:
    """Return bfloat16 if the device has instructions for its products, else float32."""
    is_cuda = device.type == "cuda"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if is_cuda else multiplies_bfloat16()
    return "bfloat16" if has_bfloat16 else "float32"


def slow_precision(config: TrainConfig, device: torch.device) -> str | None:
    """Return a warning if `fast_precision` would be many times as fast as the config's precision on this device."""
    fast = fast_precision(device)
    if config.precision == "bfloat16" and fast == "float32":
        return (
            "precision = bfloat16 is many times slower than float32 on this device, which has no instructions for it; "
            "a new run can use float32"
        )
    if config.precision == "float16" and device.type == "cpu":
        return f"precision = float16 is many times slower on a CPU than {fast}; a new run can use that"
    return None


def for_evaluation(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the config for evaluation on a device: in float32 instead of a precision that is slow there."""
    return with_values(config, precision="float32") if slow_precision(config, device) else config
