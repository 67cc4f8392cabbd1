"""One throwaway training pass that finds what exact mode does not support."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distributed.exact.check.batch_norm_constants import has_statistics
from distributed.exact.check.module_stack import ModuleStack
from distributed.exact.check.problems import Problem
from distributed.exact.check.registered import INSTEAD_OF_HOOK
from distributed.exact.check.saved_model import SavedModel
from distributed.exact.check.watch import Watch
from distributed.exact.torch_compat import Node, has_hooks, has_saved_tensors_hooks
from distributed.models.keyed_dropout import KeyedDropout, use_sample_keys
from distributed.models.torch_compat import AnyBatchNorm, hooks_of

_COMPLEX = "store it as a real tensor [..., 2] and use torch.view_as_complex in forward"
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad)


def watch_training(model: nn.Module, images: Tensor, keys: Tensor, saved: SavedModel) -> Iterator[Problem]:
    """Run one forward and one backward pass in training mode, and yield the problems that they show.

    Args:
        model: batch norm layers record their statistics; see `batch_norm_constants`.
        images: [n, 3, side, side].
        keys: of the dropout masks, int64 [n, 2].
        saved: the state of the model before; the caller restores it.
    """
    watch = _TrainingWatch(model, saved)
    # Inputs that require gradients, because otherwise reentrant checkpointing around the first layer leaves no trace.
    inputs = images.clone().requires_grad_()
    with use_sample_keys(keys), watch.stack, watch, torch.enable_grad():
        output = model(inputs.clone())
    yield from watch.problems(saved.changes())
    yield from _of_uncalled_batch_norms(model, watch.called)
    if not isinstance(output, Tensor) or output.dim() < 1 or len(output) != len(images):
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        yield Problem("", f"returns {what} for {len(images)} images", "return one row of logits per image")
        return
    watch.note_nodes("", [output])
    in_graph = list(_in_graph(model, watch.nodes))
    yield from in_graph
    if not in_graph and output.requires_grad:
        yield from _watch_backward(model, inputs, output)


class _TrainingWatch(Watch):
    """Also notes which module registers a hook, computes gradients or creates a node of the graph."""

    def __init__(self, model: nn.Module, saved: SavedModel) -> None:
        super().__init__(model, saved)
        self.nodes: dict[Node, str] = {}
        self._flags = _cudnn_flags()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOOKS:
            self.add("registers a hook on a tensor, which would not run", INSTEAD_OF_HOOK)
        if func in _DERIVATIVES:
            self.add("computes gradients in forward", "compute them in closed form")
        return super().__torch_function__(func, types, args, kwargs)

    def _before(self, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        super()._before(module, path, inputs)
        self.note_nodes(self.stack.inside, inputs)
        if isinstance(module, AnyBatchNorm) and has_saved_tensors_hooks():
            applies = "which would then apply to other shards too"
            self.add(f"calls a batch norm inside saved_tensors_hooks, {applies}", "exit them before each batch norm")
        if isinstance(module, AnyBatchNorm) and _cudnn_flags() != self._flags:
            self.add("calls a batch norm inside torch.backends.cudnn.flags", "leave cuDNN's flags as they are")

    def _after(self, module: nn.Module, path: str, outputs: list[Tensor]) -> None:
        super()._after(module, path, outputs)
        self.note_nodes(path, outputs)

    def note_nodes(self, path: str, results: list[Tensor]) -> None:
        """Attribute the new nodes in the graph of these tensors to the module at `path`."""
        waiting: list[Node] = [tensor.grad_fn for tensor in results]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self.nodes:
                self.nodes[node] = path
                waiting += [target for target, _ in node.next_functions]


def _cudnn_flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.deterministic, cudnn.benchmark


def _of_uncalled_batch_norms(model: nn.Module, called: set[str]) -> Iterator[Problem]:
    for path, layer in model.named_modules():
        if isinstance(layer, AnyBatchNorm) and layer.training and path not in called and has_statistics(layer):
            updates = (
                "has its statistics updated although the layer itself is never called, so it would not be synchronized"
            )
            yield Problem(path, updates, "call the layer, not its forward or F.batch_norm")


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
