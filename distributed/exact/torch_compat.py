"""torch's private names for autograd nodes, as read from torch 2.14.1.

tests/unit/test_torch_internals.py fails if the installed torch lacks one of them.
"""

from functools import cache
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Node",
    "get_backward_group",
    "has_hooks",
    "has_saved_tensors_hooks",
    "input_metadata",
    "is_leaf",
    "is_python",
    "sequence_number",
    "set_backward_group",
]

Node = Any  # torch.autograd.graph.Node does not declare that nodes can be called
_AccumulateGrad: type = torch._C._functions.AccumulateGrad

get_backward_group, set_backward_group = torch._C._get_graph_exec_group, torch._C._set_graph_exec_group
"""Get and set this thread's `GraphExecGroup`, within which a checkpointed block is computed again only once."""


def is_leaf(node: Node) -> bool:
    """Whether the node is the one at which a leaf's gradient arrives; its `variable` is the leaf."""
    return type(node) is _AccumulateGrad


def is_python(node: Node) -> bool:
    """Whether the node belongs to a `torch.autograd.Function`: it cannot be called, but has `apply`."""
    return isinstance(node, BackwardCFunction)


@cache
@torch.enable_grad()
def python_nodes_are_weak() -> bool:
    """Whether the object of a Python node does not keep the node itself alive, as in torch 2.11: only its consumers do."""
    node = _Identity.apply(torch.ones((), requires_grad=True)).grad_fn
    try:
        input_metadata(node)
    except RuntimeError:
        return True
    return False


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def input_metadata(node: Node) -> list[Any]:
    """Return the shape, dtype and device of each gradient that a node receives."""
    return node._input_metadata  # type: ignore[no-any-return]


def sequence_number(node: Node) -> int:
    """Return a number that grows with each node that the forward pass creates on a thread."""
    return node._sequence_nr()  # type: ignore[no-any-return]


def has_saved_tensors_hooks() -> bool:
    """Whether this thread is within `saved_tensors_hooks`, other than those of checkpointing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # not those that tracing ignores
    return hooks is not None and getattr(hooks[0], "__module__", "") != checkpoint.__module__


def has_hooks(node: Node) -> bool:
    """Whether hooks are registered on a node itself; those of tensors are stored elsewhere."""
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *_: None)
        hooks = handle.hooks_dict_ref()  # the only access to the others
        handle.remove()
        if hooks:
            return True
    return False
