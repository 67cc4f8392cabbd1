"""Checks that an imported network works on a GPU, and that its steps can be captured as CUDA graphs."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from distributed.config import TrainConfig
from distributed.errors import InputError
from distributed.exact.check.saved_model import unchanged
from distributed.exact.check.supported import changed_by_forward
from distributed.training.precision import fast_precision


def try_on_device(
    check: Callable[..., bool],
    model: nn.Module,
    images: Tensor,
    keys: Tensor,
    config: TrainConfig,
    device: torch.device,
) -> bool:
    """Try the network on its GPU, as precisely as in training, and return whether it draws random numbers on the CPU.

    Raises:
        InputError: it fails there, e.g. because a constant that is no buffer stays on the CPU.
    """
    precision = fast_precision(device) if config.precision == "auto" else config.precision
    low = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    with unchanged(model):
        model.to(device)  # not only the copy that is tried: functions in it may refer to this one
        return check(images.to(device), keys.to(device), low=low)


def check_captured(
    model: nn.Module,
    images: Tensor,
    name: str,
    *,
    replaced: Collection[str],
    draws_on_host: bool,
    one_size: bool = True,
) -> None:
    """Raise InputError if the network's forward pass depends on Python code that has to run in every step.

    A replayed CUDA graph runs none, and it reads only tensors that live as long as the graph.

    Args:
        replaced: the result of `replaced_tensors`.
        draws_on_host: the result of `try_on_device`.
        one_size: all images have the same size, so that what is cached by size is never replaced.
    """
    if draws_on_host:
        raise InputError(
            f"model.name = {name}: the forward pass draws random numbers on the CPU, which a replayed CUDA graph would not "
            "repeat; draw them on the device of the images, or set cuda_graphs = false"
        )
    captured = {path for path, _ in model.named_buffers() if path not in replaced} | model.state_dict().keys()
    captured |= {  # computed from other tensors in every pass
        f"{path}.{hook.name}".lstrip(".")
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, SpectralNorm)
    }
    if kept := [path for path in changed_by_forward(model, images, after_first=one_size) if path not in captured]:
        raise InputError(
            f"model.name = {name}: the forward pass changes {kept[0]}, but a replayed CUDA graph runs no Python; make it a "
            "buffer that is changed in place, or set cuda_graphs = false"
        )
