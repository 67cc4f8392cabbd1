"""Which networks exact mode refuses, by which module and with which remedy."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from distributed.config.models import Model
from distributed.errors import InputError
from distributed.exact.check.supported import check_exact
from distributed.models.build import build_model
from distributed.models.convert_dropout import convert_dropout

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Call(nn.Module):
    """Calls a function of (module, x) as its forward; x is [n, 12]."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def around(layer: nn.Module) -> nn.Module:
    """Return a small network with the layer at 4.inner; it maps [n, 12] to [n, 12]."""
    inner = nn.Sequential()
    inner.add_module("inner", layer)
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        inner,
        nn.Linear(12, 5),
    )


def refusal(model: nn.Module) -> str:
    with pytest.raises(InputError) as error:
        check_exact(model, IMAGES)
    return str(error.value)


def own_state(module: nn.Module, x: Tensor) -> Tensor:
    module.average.lerp_(x.detach().mean(0), 0.1)
    return x * 2


def count(module: nn.Module, x: Tensor) -> Tensor:
    module.calls += 1
    return x


def cache(module: nn.Module, x: Tensor) -> Tensor:
    module.last = x.detach()
    return x


def cache_in_list(module: nn.Module, x: Tensor) -> Tensor:
    module.cache.append(x.detach())
    return x


def hook_activation(module: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return y


def hook_node(module: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    y.grad_fn.register_prehook(lambda gradients: gradients)
    return y


def gradient_in_forward(module: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(x.square().sum(), x, create_graph=True)[0]


def temporary_attribute(module: nn.Module, x: Tensor) -> Tensor:
    module.skip = x
    x = module.layer(x) + module.skip
    module.skip = None
    return x


def temporary_list(module: nn.Module, x: Tensor) -> Tensor:
    module.features.append(x)
    return module.layer(x) + module.features.pop()


def other_weights(module: nn.Module, x: Tensor) -> Tensor:
    weights = {name: parameter * 1.0 for name, parameter in module.layer.named_parameters()}
    return functional_call(module.layer, weights, (x,))


def hooks_on_saved_tensors(module: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda tensor: tensor.half(), lambda tensor: tensor.float()):
        return module.norm(x)


def without_cudnn(module: nn.Module, x: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return module.norm(x)


class CachesInEvaluation(nn.Linear):
    """Keeps a product of its weights during evaluation, like timm's LeViT."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        if mode and self.cache:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ (self.weight * 2).t()
        if "weight" not in self.cache:
            self.cache["weight"] = self.weight * 2
        return x @ self.cache["weight"].t()


def frozen_teacher() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12)).eval().requires_grad_(False)


def taught_by_closure() -> nn.Module:
    teacher = frozen_teacher()
    return Call(lambda m, x: x + m.teach(x), teach=lambda x: teacher(x))


def attention_by_one_kernel(module: nn.Module, x: Tensor) -> Tensor:
    parts = x.view(len(x), 1, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(parts, parts, parts).flatten(1)


def fixed_noise(module: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x + torch.randn(12)


def noise_in_evaluation(module: nn.Module, x: Tensor) -> Tensor:
    return x if module.training else x + torch.randn_like(x)


def count_in_evaluation(module: nn.Module, x: Tensor) -> Tensor:
    module.seen += 0 if module.training else len(x)
    return x


def fill_in_evaluation(get: Callable[[nn.Module], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    if not module.training and not get(module).any():
        get(module).fill_(2.0)
    return x * 2


def closure_around_a_module() -> nn.Module:
    layer = nn.Linear(12, 12)
    outer = nn.Sequential(layer)
    return Call(lambda m, x: m.apply(x), layer=layer, apply=lambda x: outer(x))


class Merging(nn.Linear):
    """A linear layer with LoRA, which `eval` merges into the weight."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.down, self.up = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.zeros(12, 2))
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        if mode == self.merged:
            self.weight.data += (self.up @ self.down).detach() * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x @ self.down.t() @ self.up.t()


@dataclass
class Node:
    layer: nn.Module


def norm_in(hold: Callable[[nn.Module], object], call: Callable[[object, Tensor], Tensor]) -> nn.Module:
    """Return a network that calls its batch norm through another object."""
    norm = nn.BatchNorm1d(12)
    return Call(lambda m, x: call(m.held, x), held=hold(norm), registered=norm)


def norm_in_closure() -> nn.Module:
    norm = nn.BatchNorm1d(12)
    return Call(lambda m, x: m.normalize(x), registered=norm, normalize=lambda x: norm(x))


def norm_by_function(module: nn.Module, x: Tensor) -> Tensor:
    norm = module.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)


def hooked(register: str) -> nn.Module:
    layer = nn.Linear(12, 12)
    getattr(layer, register)(lambda *_: None)
    return layer


def hooked_parameter() -> nn.Module:
    layer = nn.Linear(12, 12)
    layer.weight.register_hook(lambda gradient: gradient * 2)
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(12, 12), "weight", 0.5)


def checkpointed(reentrant: bool, *layers: nn.Module) -> nn.Module:
    return Call(lambda module, x: checkpoint(module.body, x, use_reentrant=reentrant), body=nn.Sequential(*layers))


def compiled_in_place() -> nn.Module:
    layer = nn.Linear(12, 12)
    layer.compile()
    return layer


class NeverTraining(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class OwnBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class SameBatchNorm(nn.BatchNorm1d):
    """A subclass that computes the same."""


def sparse_embedding(module: nn.Module, x: Tensor) -> Tensor:
    return x + module.table((x > 0).long()).flatten(1)


def complex_weight(module: nn.Module, x: Tensor) -> Tensor:
    return (x * module.weight).real


KEYED = "use dropout layers"


class BackwardInBackward(torch.autograd.Function):
    """Recomputes a layer in its backward pass, like a reversible block; the layer's gradients go to `.grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            output: Tensor = layer(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.layer(x).backward(gradient)
        return x.grad, None


REFUSED = {
    "a backward pass in the backward pass": (
        lambda: Call(lambda m, x: BackwardInBackward.apply(x, m.layer), layer=nn.Linear(12, 12)),
        "gets gradients from a backward()",
        "return all gradients from backward",
    ),
    "functional dropout": (lambda: Call(lambda _, x: F.dropout(x)), "draws from torch's generator", KEYED),
    "nn.Dropout": (lambda: nn.Dropout(0.5), "draws from torch's generator", KEYED),
    "RReLU": (lambda: nn.RReLU(), "draws from torch's generator", "use nn.LeakyReLU"),
    "Python's random": (lambda: Call(lambda _, x: x * random.random()), "draws from Python's generator", KEYED),
    "numpy": (lambda: Call(lambda _, x: x * float(np.random.rand())), "draws from numpy's generator", KEYED),
    "a torch.Generator": (
        lambda: Call(lambda m, x: x * torch.rand(12, generator=m.own), own=torch.Generator()),
        "draws from a torch.Generator",
        KEYED,
    ),
    "a numpy Generator": (
        lambda: Call(lambda m, x: x * float(m.own.random()), own=np.random.default_rng(3)),
        "4.inner (Call): does not repeat itself",
        "draw random numbers only in dropout layers",
    ),
    "a random.Random": (
        lambda: Call(lambda m, x: x * m.own[0].random(), own=[random.Random(3)]),
        "4.inner (Call): does not repeat itself",
        "draw random numbers only in dropout layers",
    ),
    "a buffer": (
        lambda: Call(own_state, average=torch.zeros(12)),
        "keeps state: forward changes its average",
        "compute it in",
    ),
    "a parameter": (
        lambda: Call(own_state, average=nn.Parameter(torch.zeros(12), requires_grad=False)),
        "keeps state: forward changes its average",
        "compute it in __init__",
    ),
    "instance norm": (
        lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten()),
        "4.inner.1 (InstanceNorm1d): keeps state: forward changes its running_mean",
        "only batch norm may keep statistics",
    ),
    "a counter": (lambda: Call(count, calls=0), "keeps state: forward changes its calls", "compute it in __init__"),
    "a cached tensor": (
        lambda: Call(cache, last=None),
        "keeps state: forward changes its last",
        "compute it in __init__",
    ),
    "a new attribute": (lambda: Call(cache), "keeps state: forward changes its last", "compute it in __init__"),
    "a list": (
        lambda: Call(cache_in_list, cache=[]),
        "keeps state: forward changes its cache",
        "compute it in __init__",
    ),
    **{
        f"a {type(value).__name__} as state": (
            lambda value=value, change=change: Call(lambda m, x: (change(m.seen), x)[1], seen=value),
            "keeps state: forward changes its seen",
            "compute it in __init__",
        )
        for value, change in [
            (deque([0], maxlen=1), lambda seen: seen.append(len(seen) + sum(seen))),
            (set[object](), lambda seen: seen.add(object())),
            (bytearray(1), lambda seen: seen.append(0)),
            (np.zeros(2), lambda seen: seen.__iadd__(1)),
        ]
    },
    "state in evaluation": (
        lambda: Call(count_in_evaluation, seen=0),
        "in evaluation, keeps state: forward changes its seen",
        "compute it in __init__",
    ),
    **{
        f"a {kind} filled in evaluation": (
            lambda held=held, get=get: Call(partial(fill_in_evaluation, get), held=held),
            "in evaluation, keeps state: forward changes its held",
            "compute it in __init__",
        )
        for kind, held, get in [
            ("tensor", [torch.zeros(12)], lambda module: module.held[0]),
            ("table", {"sum": torch.zeros(12)}, lambda module: module.held["sum"]),
        ]
    },
    "cumulative sums in evaluation": (
        lambda: Call(lambda m, x: x if m.training else x.cumsum(0)),
        "in evaluation, mixes the samples of a batch",
        "compute it for each sample alone",
    ),
    "a closure around a module of the network": (
        closure_around_a_module,
        "4.inner (Call): has a function apply that refers to a module of the network",
        "make it a method",
    ),
    "draws in evaluation": (lambda: Call(noise_in_evaluation), "in evaluation, draws from torch's generator", KEYED),
    "mixing in evaluation": (
        lambda: Call(lambda m, x: x if m.training else x - x.mean(0)),
        "in evaluation, mixes the samples of a batch",
        "compute it for each sample alone",
    ),
    "fixed noise": (lambda: Call(fixed_noise), "draws from torch's generator", KEYED),
    "weights merged by eval": (
        lambda: Merging(),
        "4.inner (Merging): changes its weight in eval()",
        "compute it in forward",
    ),
    "a temporary attribute": (
        lambda: Call(temporary_attribute, skip=None, layer=nn.Linear(12, 12)),
        "4.inner (Call): changes its skip during forward, which other shards see",
        "pass values on as arguments",
    ),
    "a temporary entry": (
        lambda: Call(temporary_list, features=[], layer=nn.Linear(12, 12)),
        "4.inner (Call): changes its features during forward",
        "pass values on as arguments",
    ),
    "functional_call": (
        lambda: Call(other_weights, layer=nn.Linear(12, 12)),
        "4.inner.layer (Linear): changes its weight, bias during forward",
        "compute with other weights by F.linear",
    ),
    "hooks on saved tensors": (
        lambda: Call(hooks_on_saved_tensors, norm=nn.BatchNorm1d(12)),
        "4.inner (Call): calls a batch norm inside saved_tensors_hooks",
        "exit them before each batch norm",
    ),
    "sdpa_kernel": (
        lambda: Call(attention_by_one_kernel),
        "changes attention's kernels for the entire process",
        "leave it as it is",
    ),
    "cuDNN's flags": (
        lambda: Call(without_cudnn, norm=nn.BatchNorm1d(12)),
        "4.inner (Call): calls a batch norm inside torch.backends.cudnn.flags",
        "leave cuDNN's flags",
    ),
    "spectral norm": (
        lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12)),
        "4.inner.parametrizations.weight.0 (_SpectralNorm): keeps state: forward changes its _u, _v",
        "compute it in __init__",
    ),
    **{
        name: (
            lambda name=name: hooked(name),
            "has the hook hooked.<locals>.<lambda>",
            "compute in forward what the hook computes",
        )
        for name in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
    "a parameter's hook": (lambda: hooked_parameter(), "has a hook on its parameter weight", "compute in forward"),
    "an activation's hook": (lambda: Call(hook_activation), "registers a hook on a tensor", "compute in forward"),
    "a node's hook": (lambda: Call(hook_node), "registers a hook on a node of the graph", "compute in forward"),
    "a gradient": (lambda: Call(gradient_in_forward), "computes gradients in forward", "compute them in closed form"),
    "a batch norm only in a list": (
        lambda: Call(lambda m, x: m.layers[0](x), layers=[nn.BatchNorm1d(12)]),
        "4.inner (Call): calls a BatchNorm1d that is not registered as one of its modules",
        "use nn.ModuleList",
    ),
    "a batch norm in a closure": (
        norm_in_closure,
        "4.inner (Call): has a function normalize that refers to a module",
        "make it a method",
    ),
    "a batch norm's forward": (
        lambda: norm_in(lambda norm: norm.forward, lambda forward, x: forward(x)),
        "4.inner.registered (BatchNorm1d): has its statistics updated although the layer itself is never called",
        "call the layer, not its forward",
    ),
    "F.batch_norm": (
        lambda: Call(norm_by_function, norm=nn.BatchNorm1d(12)),
        "4.inner.norm (BatchNorm1d): has its statistics updated although the layer itself is never called",
        "call the layer, not its forward or F.batch_norm",
    ),
    "a parametrized batch norm": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(12)),
        "is a batch norm with parametrized weights",
        "remove its parametrization",
    ),
    "old weight norm": (
        lambda: torch.nn.utils.weight_norm(nn.Linear(12, 12)),
        "uses torch.nn.utils.weight_norm",
        "use torch.nn.utils.parametrizations.weight_norm",
    ),
    "old spectral norm": (
        lambda: torch.nn.utils.spectral_norm(nn.Linear(12, 12)),
        "uses torch.nn.utils.spectral_norm",
        "remove it",
    ),
    "pruning": (lambda: pruned(), "is pruned", "call torch.nn.utils.prune.remove"),
    "reentrant": (
        lambda: checkpointed(True, nn.Linear(12, 12)),
        "uses reentrant checkpointing",
        "pass use_reentrant=False",
    ),
    "recomputed": (
        lambda: checkpointed(False, nn.BatchNorm1d(12)),
        "4.inner.body.0 (BatchNorm1d): is a batch norm that checkpointing computes again",
        "keep it outside the checkpointed part",
    ),
    "recomputed dropout": (
        lambda: checkpointed(False, convert_dropout(nn.Sequential(nn.Dropout(0.5)))),
        "4.inner.body.0.0 (KeyedDropout): is a dropout that checkpointing computes again",
        "keep it outside the checkpointed part",
    ),
    "sparse": (
        lambda: Call(sparse_embedding, table=nn.Embedding(2, 1, sparse=True)),
        "4.inner.table (Embedding): has a sparse gradient of its weight",
        "pass sparse=False",
    ),
    "complex": (
        lambda: Call(complex_weight, weight=nn.Parameter(torch.ones(12, dtype=torch.complex64))),
        "has a complex gradient of its weight",
        "use torch.view_as_complex",
    ),
    "OwnBatchNorm": (lambda: OwnBatchNorm(12), "is a batch norm with its own forward", "use nn.BatchNorm1d"),
    "a batch norm that never trains": (lambda: NeverTraining(12), "with its own train", "use nn.BatchNorm1d"),
    "torch.compile": (lambda: torch.compile(nn.Linear(12, 12)), "is compiled", "remove torch.compile"),
    "Module.compile": (lambda: compiled_in_place(), "is compiled", "remove torch.compile"),
    "a compiled function": (
        lambda: Call(lambda _, x: torch.compile(torch.sin, backend="aot_eager")(x)),
        "calls a compiled function",
        "remove torch.compile",
    ),
    "attention's dropout": (
        lambda: Call(
            lambda m, x: m.attend(*[x[:, None]] * 3)[0][:, 0],
            attend=nn.MultiheadAttention(12, 2, 0.1, batch_first=True),
        ),
        "4.inner.attend (MultiheadAttention): draws from torch's generator",
        "set its dropout to 0",
    ),
    "lazy": (lambda: nn.LazyLinear(12), "has no shapes", "pass the number of input features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_the_remedy(name: str) -> None:
    layer, problem, remedy = REFUSED[name]
    torch.manual_seed(0)  # by chance, RReLU also draws as many numbers as other images have negative ones
    message = refusal(around(layer()))
    assert message.startswith("exact.shards > 0: 4.inner")
    assert problem in message.partition(";")[0]
    assert remedy in message.partition(";")[2]
    assert message.endswith("; or set exact.shards = 0")
    assert len(message.splitlines()) == (2 if name == "old spectral norm" else 1), "one cause has one line"


def test_all_problems_are_named_at_once() -> None:
    first, second = message_lines = refusal(
        around(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.1), hooked("register_forward_hook")))
    ).splitlines()
    assert len(message_lines) == 2
    assert first.startswith("exact.shards > 0: 4.inner.2 (Linear): has the hook")
    assert second.startswith("exact.shards > 0: 4.inner.0 (Dropout) and 1 more: draws from torch's generator")


def test_a_failing_pass_does_not_hide_reasons() -> None:
    def fail(_: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("no forward")

    with pytest.raises(RuntimeError, match="no forward"):
        check_exact(around(Call(fail)), IMAGES)
    assert "has the hook" in refusal(around(nn.Sequential(hooked("register_forward_hook"), Call(fail))))


def test_outputs_other_than_logits_are_refused() -> None:
    model = around(nn.Identity())
    assert "(Call): returns tuple for 3 images; return one row" in refusal(
        Call(lambda m, x: (m.body(x), x), body=model)
    )
    assert "(Call): returns [] for 3 images" in refusal(Call(lambda m, x: m.body(x).sum(), body=model))


class Lstm(nn.Module):
    """Reads an image row by row; time comes first, so that dimension 0 is not that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 6, num_layers=2, bidirectional=True)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(2, 0, 1, 3).flatten(2)
        return self.head(self.lstm(rows)[0][-1])


def tied() -> nn.Module:
    layer, other = nn.Linear(12, 12), nn.Linear(12, 12)
    other.weight = layer.weight
    return nn.Sequential(layer, nn.ReLU(), other, layer)


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=8,
        dropout=0.1,
    )


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


SUPPORTED = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(12),
    "SameBatchNorm": lambda: SameBatchNorm(12),
    "BatchNorm without statistics": lambda: nn.BatchNorm1d(12, track_running_stats=False),
    "BatchNorm without parameters": lambda: nn.BatchNorm1d(12, affine=False, momentum=None),
    "frozen": lambda: frozen(nn.BatchNorm1d(12)),
    "a batch norm in a list": lambda: norm_in(lambda norm: [norm], lambda held, x: held[0](x)),
    "a batch norm in a dataclass": lambda: norm_in(Node, lambda held, x: held.layer(x)),
    "a cache in evaluation": lambda: CachesInEvaluation(),
    "a frozen network in a list": lambda: Call(lambda m, x: x + m.teacher[0](x), teacher=[frozen_teacher()]),
    "a frozen network in a closure": lambda: taught_by_closure(),
    "a batch norm in a partial": lambda: norm_in(partial, lambda held, x: held(x)),
    "LayerNorm": lambda: nn.LayerNorm(12),
    "GroupNorm": lambda: nn.GroupNorm(3, 12),
    "InstanceNorm": lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.InstanceNorm1d(3, affine=True), nn.Flatten()),
    "a constant buffer": lambda: Call(lambda m, x: x * m.scale, scale=torch.full((12,), 2.0)),
    "a constant in a list": lambda: Call(lambda m, x: x * m.scales[0], scales=[torch.ones(12)]),
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 12), nn.ELU(inplace=True)),
    "weight tying": lambda: tied(),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(12, 12)),
    "an unused layer": lambda: Call(lambda _, x: x, unused=nn.Linear(3, 3)),
    "checkpointing": lambda: checkpointed(False, nn.Linear(12, 12)),
    "keyed dropout": lambda: convert_dropout(nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.1))),
    "attention": lambda: Call(
        lambda m, x: m.attend(*[x.view(len(x), 3, 4)] * 3)[0].flatten(1),
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    "sorting within a sample": lambda: Call(lambda _, x: x.sort(1).values),
    "a square root of zero": lambda: Call(lambda _, x: x + (x.relu() * 0).sqrt()),
    "a head of zeros": lambda: Call(lambda m, x: m.head(x) * 0, head=nn.Linear(12, 12)),
    "a logit of -inf": lambda: Call(lambda _, x: x.masked_fill(torch.arange(12) == 3, -1e30)),
}


def test_a_cache_in_evaluation_is_refused_on_cuda() -> None:
    """Another shard's stream would not wait for it."""
    with pytest.raises(InputError, match="in evaluation, keeps state: forward changes its cache"):
        check_exact(around(CachesInEvaluation()), IMAGES, device_type="cuda")


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_layers(name: str) -> None:
    check_exact(around(SUPPORTED[name]()), IMAGES)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lstm": (Lstm, 8),
    "vit": (vision_transformer, 8),
    **{
        name: (getattr(torchvision.models, name), 32)
        for name in (
            "resnet18",
            "densenet121",
            "mobilenet_v3_small",
            "efficientnet_b0",
            "convnext_tiny",
            "shufflenet_v2_x0_5",
        )
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_supported_networks(name: str) -> None:
    build, side = NETWORKS[name]
    check_exact(convert_dropout(build()), torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1)))


def test_memory_efficient_densenet_is_refused() -> None:
    model = torchvision.models.DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, memory_efficient=True, num_classes=5
    )
    message = refusal(Call(lambda m, x: m.body(F.interpolate(x, 32)), body=model))
    assert "body.features.denseblock" in message
    assert "is a batch norm that checkpointing computes again" in message


def test_the_built_in_networks_are_supported() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for name in ("improved_alexnet", "cifar_alexnet_bn"):
        check_exact(build_model(Model(name=name), num_classes=10, seed=0), images)
