"""The backward pass in Python gives the gradients of `loss.backward()`, bit for bit, and frees memory like it."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from distributed.exact.autograd_pass import backward
from distributed.models.alexnet import improved_alexnet
from distributed.models.local_response_norm import LocalResponseNorm

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("one_thread")]


def both_ways(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of the pass in Python and of torch's engine, by parameter name."""
    by_engine = copy.deepcopy(model)
    loss_of(by_engine).backward()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}

    def sink(parameter: Tensor, gradient: Tensor) -> None:
        assert names[parameter] not in found
        found[names[parameter]] = gradient

    loss = loss_of(model)
    backward(loss, sink, {})
    assert loss.grad_fn is None
    assert all(parameter.grad is None for parameter in model.parameters())
    return found, {name: p.grad for name, p in by_engine.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    found, expected = both_ways(model, loss_of)
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype, name
        assert torch.equal(found[name], gradient), name
    return found


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "improved_alexnet": lambda: improved_alexnet(10, 0.0),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=10),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10, dropout=0.0),
    "vit": vit,
}


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_get_the_gradients_of_torchs_engine(name: str, bfloat16: bool) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().to(memory_format=torch.channels_last)
    images, labels = torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.tensor([1, 2, 3])

    def loss_of(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            logits = net(images)
        return nn.functional.cross_entropy(logits.float(), labels)

    assert_same(model, loss_of)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 4)


def broadcasting(net: Any) -> Tensor:
    return ((net.a + net.b) * net.b * net.a).sum()


def used_three_times(net: Any) -> Tensor:
    x = net.layer(net.layer(net.a + net.b).relu())
    return (net.layer(x) * net.b).sum()


def the_same_gradient_for_two(net: Any) -> Tensor:
    return (net.a.expand(3, 4) + net.layer.weight[:3]).sum()


def views_and_in_place(net: Any) -> Tensor:
    x = (net.a * net.b).clone()
    x[:, 1:3].mul_(net.b[1:3])
    return x.unbind(1)[1].sum() + x.chunk(2, dim=1)[1].square().sum()


def mixed_dtypes(net: Any) -> Tensor:
    return (net.layer(net.b).bfloat16() * net.a.double()).float().sum()


def one_parameter(net: Any) -> Tensor:
    return net.a.sum()


def a_detached_branch(net: Any) -> Tensor:
    return (net.a.detach() * net.b + net.layer(net.b).detach()).sum()


class TwoOutputs(torch.autograd.Function):
    """Arguments without gradients come between those with; the second result may be unused."""

    @staticmethod
    def forward(ctx: Any, scale: float, x: Tensor, constant: Tensor, flag: bool, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y, constant)
        ctx.scale = scale
        return scale * x * y * constant, y + 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:
        x, y, constant = ctx.saved_tensors
        return None, ctx.scale * first * y * constant, None, None, ctx.scale * first * x * constant + second


class WithoutZeros(torch.autograd.Function):
    """Returns no gradient for its second argument, and one result more than it has arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, y * 3

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:
        return first * 2, None, None


def an_unused_output(net: Any) -> Tensor:
    first, _ = TwoOutputs.apply(2.0, net.layer.weight, torch.arange(4.0), True, net.b)
    return first.sum() + net.a.sum()


def both_outputs(net: Any) -> Tensor:
    first, second = TwoOutputs.apply(2.0, net.layer.weight, torch.arange(4.0), True, net.b)
    return (first * second).sum()


def an_undefined_gradient(net: Any) -> Tensor:
    first, second = WithoutZeros.apply(net.layer.weight, net.b * 2)
    return (first + second).sum()


def response_norm(net: Any) -> Tensor:
    x = (net.a * net.b).view(1, 3, 2, 2)
    return LocalResponseNorm(3)(x).square().sum()


def attention(net: Any) -> Tensor:
    x = net.layer(net.a + net.b).view(1, 1, 3, 4)
    return nn.functional.scaled_dot_product_attention(x, x * net.b, x).sum()


CASES = [
    broadcasting, used_three_times, the_same_gradient_for_two, views_and_in_place, mixed_dtypes, one_parameter,
    a_detached_branch, an_unused_output, both_outputs, an_undefined_gradient, response_norm, attention,
]  # fmt: skip


@pytest.mark.parametrize("loss_of", CASES, ids=lambda case: case.__name__)
def test_graphs_get_the_gradients_of_torchs_engine(loss_of: Callable[[nn.Module], Tensor]) -> None:
    assert_same(Net(), loss_of)


def test_an_undefined_gradient_reaches_no_parameter() -> None:
    assert "b" not in assert_same(Net(), an_undefined_gradient)


def test_frozen_parameters_get_no_gradient() -> None:
    net = Net()
    net.layer.weight.requires_grad_(False)
    assert "layer.weight" not in assert_same(net, used_three_times)


def test_lstm() -> None:
    torch.manual_seed(0)
    images = torch.randn(5, 7, 6)
    assert_same(nn.LSTM(6, 8, num_layers=2, batch_first=True), lambda net: net(images)[0][:, -1].square().sum())


class Probe(torch.autograd.Function):
    """Identity whose backward calls a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradient, None


def test_what_a_node_saved_is_freed_once_it_has_run() -> None:
    weight, alive = nn.Parameter(torch.ones(3)), list[int]()
    kept = [torch.zeros(1000) for _ in range(4)]
    references = [weakref.ref(tensor) for tensor in kept]

    def count() -> None:
        alive.append(sum(reference() is not None for reference in references))

    def loss() -> Tensor:
        x = weight * 1
        for tensor in kept:
            x = Keep.apply(Probe.apply(x, count) * 1, tensor) * 1
        return x.sum()

    value = loss()
    kept.clear()
    backward(value, lambda parameter, gradient: None, {})
    assert alive == [3, 2, 1, 0]


class Keep(torch.autograd.Function):
    """Identity that keeps a tensor for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_functions_run_right_before_their_node() -> None:
    net, order = Net(), list[str]()
    x = net.a * net.b
    y = x.exp()
    before = {y.grad_fn: lambda: order.append("exp"), x.grad_fn: lambda: order.append("mul")}
    backward(Probe.apply(y, lambda: order.append("probe")).sum(), lambda p, g: order.append("leaf"), before)
    assert order == ["probe", "exp", "mul", "leaf", "leaf"]
    assert before == {}


def test_a_checkpointed_block_is_computed_again_once() -> None:
    layers, calls = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid()), list[int]()

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        return layers(x)

    loss = checkpoint(block, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum()
    backward(loss, lambda p, g: None, {})
    assert len(calls) == 2


def test_a_gradient_of_another_shape_is_an_error() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient[:2]

    with pytest.raises(RuntimeError, match="size"):
        backward(Wrong.apply(nn.Parameter(torch.ones(3))).sum(), lambda p, g: None, {})
