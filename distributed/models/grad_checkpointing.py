"""Gradient checkpointing: blocks of a network keep only their inputs and are recomputed in the backward pass.

Chen et al. 2016, arXiv 1604.06174. Results are those without it, bit for bit: dropout draws the same masks again, a buffer has
the value that it had, and batch norm counts a batch once.
"""

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from distributed.config.grad_checkpointing import GradCheckpointing
from distributed.errors import InputError
from distributed.models.keyed_dropout import repeated_draws, use_sample_keys
from distributed.models.torch_compat import AnyBatchNorm

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SETTING = "grad_checkpointing.modules"


def blocks_to_checkpoint(model: nn.Module, config: GradCheckpointing) -> list[str]:
    """Return the names of the modules to checkpoint, if enabled: those in the config, or the network's blocks.

    Blocks are modules that have layers of their own, e.g. `layer1.0` of a ResNet: those directly in the network, in a container
    there, or in a module with more than half of the network's layers.

    Raises:
        InputError: there is no such module, one contains another, one is never called, or the network has no blocks.
    """
    names = config.modules
    if not config.enabled:
        return []
    if not names:
        if found := list(_blocks(model, "", _layer_count(model) / 2)):
            return found
        raise InputError(
            "grad_checkpointing.enabled = true: the network has no blocks, which are modules with layers of their own; name "
            f"the modules to recompute in {_SETTING}"
        )
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            close = difflib.get_close_matches(name, [other for other in modules if other], n=1, cutoff=0)
            raise InputError(f"{_SETTING}: the network has no module {name!r}; did you mean {(close or ['none'])[0]}?")
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            raise InputError(f"{_SETTING}: {name} is a {type(modules[name]).__name__}, which is never called; name the "
                             "modules in it")  # fmt: skip
        if outer := [other for other in names if name.startswith(f"{other}.")]:
            raise InputError(
                f"{_SETTING}: {name} is inside {outer[0]}, which is recomputed as a whole; remove one of them"
            )
    return list(names)


def _blocks(module: nn.Module, prefix: str, large: float) -> Iterator[str]:
    """Yield the names of blocks; containers and modules with more than `large` layers are opened if blocks are in them."""
    for name, child in module.named_children():
        if not any(True for _ in child.children()):
            continue
        inner = []
        if isinstance(child, _CONTAINERS) or _layer_count(child) > large:
            inner = list(_blocks(child, f"{prefix}{name}.", large))
        if inner or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from inner
        else:
            yield f"{prefix}{name}"


def _layer_count(module: nn.Module) -> int:
    return sum(not any(True for _ in m.children()) for m in module.modules())


def checkpoint_blocks(model: nn.Module, names: Sequence[str]) -> None:
    """Let these modules compute again in the backward pass, in place. A copy of the model would share their forward."""
    for name in names:
        module = model.get_submodule(name)
        module.forward = _checkpointed(module, module.forward)


def check_checkpointing(model: nn.Module, names: Sequence[str], images: Tensor, sample_keys: Tensor) -> None:
    """Take forward and backward passes over a few images, on a copy, with and without checkpointing.

    Raises:
        InputError: a module is never called, or computes something else when it is called again.
    """
    probe = copy.deepcopy(model)
    probe.train()
    called = set[str]()
    for name in names:
        probe.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    checkpoint_blocks(probe, names)
    try:
        with use_sample_keys(sample_keys):
            probe(images).float().logsumexp(1).sum().backward()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        other = "computes something else when it is called again" if isinstance(error, CheckpointError) else "fails"
        raise InputError(
            f"grad_checkpointing: a block {other} ({reason}); name other modules in {_SETTING}, or set "
            "grad_checkpointing.enabled = false"
        ) from error
    if unused := [name for name in names if name not in called]:
        raise InputError(f"{_SETTING}: the network never calls {unused[0]}, so it would not be recomputed; remove it")


def _checkpointed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*inputs: Any, **named: Any) -> Any:
        if not (module.training and is_grad_enabled()):
            return forward(*inputs, **named)
        # To the end, not only to the last tensor that is needed: every rank must reach every batch norm's exchange.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _again(module)), **named
            )

    return compute


def _again(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context for recomputing the module's next forward pass; it records buffers and dropout draws now."""
    draws = repeated_draws()
    modules = list(module.modules())
    # Batch norm in training does not read its buffers, so their values need not be kept.
    kept = [
        {} if isinstance(m, AnyBatchNorm) else {name: b.clone() for name, b in m._buffers.items() if b is not None}
        for m in modules
    ]

    @contextmanager
    def again() -> Iterator[None]:
        buffers = [dict(m._buffers) for m in modules]
        with ExitStack() as stack:
            stack.enter_context(draws)
            for m, own, values in zip(modules, buffers, kept, strict=True):
                # Other tensors, not other values: those in the graph must not change in place.
                stack.callback(m._buffers.update, own)
                m._buffers.update({name: values.get(name, b.clone()) for name, b in own.items() if b is not None})
            yield

    return again()
