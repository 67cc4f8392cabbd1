"""One throwaway training pass that finds what exact mode does not support."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distributed.exact.check.module_stack import ModuleStack
from distributed.exact.check.problems import Problem
from distributed.exact.check.registered import INSTEAD_OF_HOOK
from distributed.exact.check.saved_model import SavedModel
from distributed.exact.check.throwaway import SavedGenerators
from distributed.exact.torch_compat import Node, has_hooks
from distributed.models.keyed_dropout import KeyedDropout, use_sample_keys
from distributed.models.torch_compat import AnyBatchNorm, hooks_of

_KEYED = (
    "use dropout layers (nn.Dropout and the like, torchvision's StochasticDepth, timm's DropPath), whose masks depend only "
    "on seed, epoch and image"
)
_STATE = "compute it in __init__, or anew in each forward; only batch norm may keep statistics"
_COMPLEX = "store it as a real tensor [..., 2] and use torch.view_as_complex in forward"
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad)


def watch_training(model: nn.Module, images: Tensor, keys: Tensor, saved: SavedModel) -> Iterator[Problem]:
    """Run one forward and one backward pass in training mode, and yield the problems that they show.

    Args:
        images: [n, 3, side, side].
        keys: of the dropout masks, int64 [n, 2].
        saved: the state of the model before; the caller restores it.
    """
    watch = _Watch(model)
    # Inputs that require gradients, because otherwise reentrant checkpointing around the first layer leaves no trace.
    inputs = images.clone().requires_grad_()
    with use_sample_keys(keys), watch.stack, watch, torch.enable_grad():
        output = model(inputs.clone())
    yield from watch.found
    for path, names in saved.changes().items():
        yield Problem(path, f"keeps state: forward changes its {', '.join(names)}", _STATE)
    if not isinstance(output, Tensor) or output.dim() < 1 or len(output) != len(images):
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        yield Problem("", f"returns {what} for {len(images)} images", "return one row of logits per image")
        return
    watch.note_nodes("", [output])
    in_graph = list(_in_graph(model, watch.nodes))
    yield from in_graph
    if not in_graph and output.requires_grad:
        yield from _watch_backward(model, inputs, output)


class _Watch(TorchFunctionMode):
    """Notes which module is at work when it draws from a generator, registers a hook or creates a node of the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack = ModuleStack(model, self._before, self._after)
        self.found: list[Problem] = []
        self.nodes: dict[Node, str] = {}
        self._generators = SavedGenerators()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, path = kwargs or {}, self.stack.inside
        if func in _HOOKS:
            self.found.append(Problem(path, "registers a hook on a tensor, which would not run", INSTEAD_OF_HOOK))
        if func in _DERIVATIVES:
            self.found.append(Problem(path, "computes gradients in forward", "compute them in closed form"))
        if isinstance(kwargs.get("generator"), torch.Generator):
            self.found.append(
                Problem(path, "draws from a torch.Generator, which depends on the number of processes", _KEYED)
            )
        return func(*args, **kwargs)

    def _before(self, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        """Attribute to the calling module what happened since it began or called the last module."""
        self._note_draws(None)
        self.note_nodes(self.stack.inside, inputs)

    def _after(self, module: nn.Module, path: str, outputs: list[Tensor]) -> None:
        self._note_draws(module)
        self.note_nodes(path, outputs)

    def _note_draws(self, module: nn.Module | None) -> None:
        for name in self._generators.drawn():
            has_dropout = isinstance(module, nn.MultiheadAttention | nn.RNNBase)
            what = f"draws from {name}, which depends on the number of processes"
            if not isinstance(module, nn.RReLU):  # refused by its type
                self.found.append(Problem(self.stack.inside, what, "set its dropout to 0" if has_dropout else _KEYED))
            self._generators = SavedGenerators()

    def note_nodes(self, path: str, results: list[Tensor]) -> None:
        """Attribute the new nodes in the graph of these tensors to the module at `path`."""
        waiting: list[Node] = [tensor.grad_fn for tensor in results]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self.nodes:
                self.nodes[node] = path
                waiting += [target for target, _ in node.next_functions]


def _in_graph(model: nn.Module, nodes: dict[Node, str]) -> Iterator[Problem]:
    """Yield the nodes that a pass in Python cannot run."""
    hooked = any(hooks_of(module) for module in model.modules())  # backward hooks of modules are hooks on nodes too
    for node, path in nodes.items():
        name = node.name()
        if "CheckpointFunction" in name:
            problem = "uses reentrant checkpointing, whose backward pass cannot pause"
            yield Problem(path, problem, "pass use_reentrant=False")
        elif "CompiledFunction" in name:
            yield Problem(path, "calls a compiled function, in which no shard can pause", "remove torch.compile")
        elif has_hooks(node) and not hooked:
            yield Problem(path, "registers a hook on a node of the graph, which would not run", INSTEAD_OF_HOOK)


def _watch_backward(model: nn.Module, inputs: Tensor, output: Tensor) -> Iterator[Problem]:
    recomputed: list[Problem] = []

    def before(module: nn.Module, path: str, _inputs: list[Tensor]) -> None:
        if isinstance(module, AnyBatchNorm | KeyedDropout):
            layer = "batch norm" if isinstance(module, AnyBatchNorm) else "dropout"
            what = f"is a {layer} that checkpointing computes again in the backward pass"
            recomputed.append(Problem(path, what, "keep it outside the checkpointed part"))

    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients: tuple[Tensor | None, ...] = ()
    for parameter in named.values():
        parameter.grad = None  # only a backward() inside the pass sets it
    try:
        with ModuleStack(model, before):
            gradients = torch.autograd.grad(output.sum(), [*named.values(), inputs], allow_unused=True)
    except Exception:
        if not recomputed:  # which is the cause
            raise
    yield from recomputed
    for path in dict.fromkeys(name.rpartition(".")[0] for name, p in named.items() if p.grad is not None):
        lost = "gets gradients from a backward() inside a backward pass, where they would be lost"
        yield Problem(path, lost, "return all gradients from backward, e.g. those of torch.autograd.grad")
    for name, gradient in zip(named, gradients, strict=False):
        path, _, last = name.rpartition(".")
        if gradient is not None and gradient.layout != torch.strided:
            yield Problem(path, f"has a sparse gradient of its {last}", "pass sparse=False")
        elif gradient is not None and gradient.is_complex():
            yield Problem(path, f"has a complex gradient of its {last}", _COMPLEX)
