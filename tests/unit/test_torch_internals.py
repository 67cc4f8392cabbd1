"""The installed torch has the private and undocumented names that models, engines and optimizers use."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import GraphExecGroup, checkpoint

from distributed.exact.torch_compat import (
    get_backward_group,
    has_hooks,
    has_saved_tensors_hooks,
    input_metadata,
    is_leaf,
    is_python,
    sequence_number,
    set_backward_group,
)
from distributed.models.torch_compat import (
    AnyBatchNorm,
    AnyDropout,
    NormBase,
    TorchDispatchMode,
    hooks_of,
    hooks_of_tensor,
    is_compiled,
)

pytestmark = pytest.mark.smoke

FOREACH = ["add_", "copy_", "lerp_", "mul", "mul_", "norm", "sub"]
KERNELS = [
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_elemt",
    "batch_norm_gather_stats_with_counts",
    "batch_norm_stats",
    "batch_norm_update_stats",
]


@pytest.mark.parametrize("name", [*(f"_foreach_{name}" for name in FOREACH), *KERNELS])
def test_torch_has_the_function(name: str) -> None:
    assert callable(getattr(torch, name))


def test_torch_has_the_batch_norm_backward_kernel() -> None:
    assert torch.ops.aten.native_batch_norm_backward.default is not None


def test_base_classes_cover_all_dimensions() -> None:
    assert all(issubclass(layer, AnyBatchNorm) for layer in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    assert issubclass(AnyBatchNorm, NormBase)
    assert all(issubclass(layer, AnyDropout) for layer in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout))


def test_the_group_of_checkpointed_passes() -> None:
    with GraphExecGroup() as group:
        assert get_backward_group() is group
        set_backward_group(None)
        assert get_backward_group() is None
        set_backward_group(group)
    assert get_backward_group() is None


def test_hooks_on_saved_tensors() -> None:
    found = []
    assert not has_saved_tensors_hooks()
    with saved_tensors_hooks(torch.Tensor.half, torch.Tensor.float):
        assert has_saved_tensors_hooks()
    checkpoint(lambda x: found.append(has_saved_tensors_hooks()) or x, torch.ones(1), use_reentrant=False)
    assert found == [False]


def test_autograd_nodes() -> None:
    leaf = torch.ones(2, requires_grad=True)
    node = (leaf * 2).grad_fn
    leaf_node = node.next_functions[0][0]
    assert (is_leaf(node), is_leaf(leaf_node), is_python(node)) == (False, True, False)
    assert leaf_node.variable is leaf
    (metadata,) = input_metadata(node)
    assert (metadata.shape, metadata.dtype, metadata.device) == ([2], leaf.dtype, leaf.device)
    assert sequence_number(leaf.exp().grad_fn) > sequence_number(node)


@pytest.mark.parametrize(
    "name",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of(name: str) -> None:
    module = nn.Linear(2, 2)
    assert hooks_of(module) == []
    getattr(module, name)(print)
    assert hooks_of(module) == [print]


def test_hooks_of_tensor() -> None:
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert hooks_of_tensor(first) == []
    first.register_hook(print)
    second.register_post_accumulate_grad_hook(print)
    assert hooks_of_tensor(first) == hooks_of_tensor(second) == [print]


def test_has_hooks() -> None:
    leaf = torch.ones(2, requires_grad=True)
    node = (leaf * 2).grad_fn
    assert not has_hooks(node)
    handle = node.register_hook(print)
    assert has_hooks(node)
    handle.remove()
    node.register_prehook(print)
    assert has_hooks(node)
    node.next_functions[0][0].register_hook(print)
    assert has_hooks(node.next_functions[0][0])


def test_is_compiled() -> None:
    layer = nn.Linear(2, 2)
    assert not is_compiled(layer)
    assert is_compiled(torch.compile(layer))
    layer.compile()
    assert is_compiled(layer)


def test_a_dispatch_mode_sees_parameters_themselves() -> None:
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend(value for value in args if isinstance(value, nn.Parameter))
            return func(*args, **kwargs or {})

    layer = nn.Linear(2, 2)
    with Seen():
        layer(torch.ones(1, 2))
    assert {id(value) for value in seen} == {id(layer.weight), id(layer.bias)}
