"""One throwaway training pass that finds what exact mode does not support."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distributed.exact.forward_trace import ModuleStack
from distributed.exact.generator_states import SavedGenerators
from distributed.exact.reasons import Paths, Reason
from distributed.exact.registered import IN_FORWARD, is_batch_norm
from distributed.exact.saved_model import SavedModel
from distributed.exact.torch_compat import has_hooks
from distributed.models.keyed_dropout import KeyedDropout, use_sample_keys

KEYED = (
    "use dropout layers (nn.Dropout and the like, torchvision's StochasticDepth, timm's DropPath), whose masks are keyed, "
    "or draw from keys of the samples"
)
_STATE = "compute it in __init__, or anew in each forward; only batch norm may keep statistics"
_WITH_DROPOUT = (nn.MultiheadAttention, nn.RNNBase)
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad)


def observe(model: nn.Module, images: Tensor, keys: Tensor, saved: SavedModel) -> Iterator[Reason]:
    """Run one forward and one backward pass in training mode, and yield the reasons that they show.

    Args:
        images: [n, 3, side, side].
        keys: of the dropout masks, int64 [n, 2].
        saved: the state of the model before; the caller restores it.
    """
    stack, paths = ModuleStack(model), Paths(model)
    watch = _Watch(stack)
    # Inputs that require gradients, because otherwise reentrant checkpointing around the first layer leaves no trace.
    inputs = images.clone().requires_grad_()
    with use_sample_keys(keys), stack.watched(watch), _Calls(watch), torch.enable_grad():
        output = model(inputs.clone())
        watch.note_draws("")
    for path, problem, remedy in watch.found:
        inner = isinstance(model.get_submodule(path), _WITH_DROPOUT) and remedy == KEYED
        yield paths.reason(path, problem, "set its dropout to 0" if inner else remedy)
    drawing = {path for path, problem, _ in watch.found if problem.startswith("draws")}
    for path, name in saved.drawn():
        if path not in drawing:
            yield paths.reason(path, f"draws from {name}, which depends on the number of processes", KEYED)
    for path, names in saved.changes().items():
        yield paths.reason(path, f"keeps state: forward changes its {', '.join(names)}", _STATE)
    if not isinstance(output, Tensor) or output.dim() < 1 or len(output) != len(images):
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        yield paths.reason("", f"returns {what} for {len(images)} images", "return one row of logits per image")
        return
    watch.note_nodes("", [output])
    graph = [paths.reason(path, problem, remedy) for path, problem, remedy in watch.in_graph()]
    yield from graph
    if not graph:
        yield from _backward(model, inputs, output, stack)


class _Watch:
    """Notes which module is at work when a generator is drawn from, a hook registered or a node created."""

    def __init__(self, stack: ModuleStack) -> None:
        self.stack = stack
        self.found: list[tuple[str, str, str]] = []
        self.nodes: dict[Any, str] = {}
        self._generators = SavedGenerators()

    def before(self, inside: str, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        self.note_draws(inside)
        self.note_nodes(inside, inputs)

    def after(self, module: nn.Module, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.note_draws(path)
        self.note_nodes(path, outputs)

    def note_draws(self, path: str) -> None:
        """Attribute the draws since the last call to the module at `path`."""
        drawn = self._generators.drawn()
        if drawn:
            self._generators.save()
            self.found += [
                (path, f"draws from {name}, which depends on the number of processes", KEYED) for name in drawn
            ]

    def note_nodes(self, path: str, results: list[Tensor]) -> None:
        """Attribute the new nodes in the graph of these tensors to the module at `path`."""
        waiting = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node not in self.nodes:
                self.nodes[node] = path
                waiting += [target for target, _ in node.next_functions if target is not None]

    def in_graph(self) -> Iterator[tuple[str, str, str]]:
        """Yield (path, problem, remedy) of the nodes that a pass in Python cannot run."""
        for node, path in self.nodes.items():
            name = node.name()
            if "CheckpointFunction" in name:
                yield path, "uses reentrant checkpointing, whose backward pass cannot pause", "pass use_reentrant=False"
            elif "CompiledFunction" in name:
                yield path, "calls a compiled function, in which no shard can pause", "remove torch.compile"
            elif has_hooks(node):
                yield path, "registers a hook on a node of the graph, which would not run", IN_FORWARD


class _Calls(TorchFunctionMode):
    """Sees the calls that leave no trace in the model: hooks on activations and draws from generators of one's own."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        path = self._watch.stack.inside
        if func in _HOOKS:
            self._watch.found.append((path, "registers a hook on a tensor, which would not run", IN_FORWARD))
        if func in _DERIVATIVES:
            self._watch.found.append((path, "computes gradients in forward", "compute them in closed form"))
        if isinstance(kwargs.get("generator"), torch.Generator):
            problem = "draws from a torch.Generator of its own, which depends on the number of processes"
            self._watch.found.append((path, problem, KEYED))
        return func(*args, **kwargs)


class _Recomputed:
    """Notes the layers whose forward runs during the backward pass."""

    def __init__(self) -> None:
        self.paths: list[tuple[str, str]] = []

    def before(self, inside: str, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        if is_batch_norm(module):
            self.paths.append((path, "is a batch norm that checkpointing would compute again, in the backward pass"))
        elif isinstance(module, KeyedDropout):
            self.paths.append((path, "is a dropout that checkpointing would compute again, with another mask"))

    def after(self, module: nn.Module, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        pass


def _backward(model: nn.Module, inputs: Tensor, output: Tensor, stack: ModuleStack) -> Iterator[Reason]:
    paths, recomputed = Paths(model), _Recomputed()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not output.requires_grad:
        return
    try:
        with stack.watched(recomputed):
            scalar = torch.where(output.isfinite(), output, 0).sum()
            gradients = torch.autograd.grad(scalar, [*named.values(), inputs], allow_unused=True)
    except Exception:
        if not recomputed.paths:
            raise
        gradients = ()
    for path, problem in recomputed.paths:
        yield paths.reason(path, problem, "keep it outside the checkpointed part")
    for name, gradient in zip(named, gradients, strict=False):
        path, _, last = name.rpartition(".")
        if gradient is not None and gradient.layout != torch.strided:
            yield paths.reason(path, f"has a sparse gradient of its {last}", "pass sparse=False")
        elif gradient is not None and gradient.is_complex():
            remedy = "store it as a real tensor [..., 2] and use torch.view_as_complex in forward"
            yield paths.reason(path, f"has a complex gradient of its {last}", remedy)
