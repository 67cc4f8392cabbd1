"""Gradient checkpointing: the same bits with less memory, and what cannot be checkpointed."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit.networks import convnext_tiny, vit_b_16
from torch import Tensor, nn
from torchvision.models import resnet18

from distributed import rng
from distributed.config.grad_checkpointing import GradCheckpointing
from distributed.errors import InputError
from distributed.models.alexnet import improved_alexnet
from distributed.models.convert_dropout import convert_dropout
from distributed.models.grad_checkpointing import blocks_to_checkpoint, check_checkpointing, checkpoint_blocks
from distributed.models.keyed_dropout import use_sample_keys

ON = GradCheckpointing(enabled=True)


class Stateful(nn.Module):
    """Uses a buffer in forward, and then changes it; like the power iteration of a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("gain", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain.clone()
        self.gain.mul_(1.5)
        return (self.linear(x) * gain).relu()


class Blocks(nn.Module):
    def __init__(self, count: int = 3, make: Callable[[], nn.Module] = Stateful) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(make() for _ in range(count))
        self.unused = nn.Sequential(nn.Linear(2, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).mean((2, 3))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 3, 32, 32), rng.sample_keys(torch.arange(count), seed=0, epoch=0)


def step(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients and buffers after two forward and backward passes."""
    images, keys = batch()
    for _ in range(2):
        with use_sample_keys(keys):
            model(images).logsumexp(1).sum().backward()
    found = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet18": (
        lambda: resnet18(num_classes=10),
        [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)],
    ),
    "improved_alexnet": (lambda: improved_alexnet(10, 0.5), ["conv"]),
    "vit_b_16": (lambda: vit_b_16(10), ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "heads"]),
    "convnext": (lambda: convnext_tiny(10), []),
    "a buffer": (lambda: Blocks(), ["blocks.0", "blocks.1", "blocks.2", "unused"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bits_are_those_without_it(name: str) -> None:
    make, blocks = NETWORKS[name]
    torch.manual_seed(0)
    model = convert_dropout(make())
    found = blocks_to_checkpoint(model, ON)
    assert found == blocks or not blocks
    other = copy.deepcopy(model)
    checkpoint_blocks(other, found)
    expected, actual = step(model), step(other)
    assert expected.keys() == actual.keys()
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []
    assert list(other.state_dict()) == list(model.state_dict())


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of distinct tensors that a graph keeps, by what is alive after the forward pass."""
    images, keys = batch(16)
    gc.collect()
    with use_sample_keys(keys):
        alive: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images).sum()
    return sum(alive.values())


def test_blocks_keep_their_inputs_alone() -> None:
    model = resnet18(num_classes=10)
    parameters = sum(p.numel() * 4 for p in model.parameters())
    other = copy.deepcopy(model)
    checkpoint_blocks(other, blocks_to_checkpoint(other, ON))
    assert saved_bytes(other) < 0.5 * (saved_bytes(model) + parameters)


REFUSED: dict[str, tuple[dict[str, Any], Callable[[], nn.Module], str]] = {
    "no blocks": ({}, lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "the network has no blocks"),
    "no such module": ({"modules": ["block.0"]}, Blocks, "has no module 'block.0'; did you mean blocks.0?"),
    "the network itself": ({"modules": [""]}, Blocks, "has no module ''; did you mean"),
    "a list of modules": ({"modules": ["blocks"]}, Blocks, "blocks is a ModuleList, which is never called"),
    "one in another": ({"modules": ["blocks.0", "blocks.0.linear"]}, Blocks, "blocks.0.linear is inside blocks.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_checkpointed_is_refused(case: str) -> None:
    settings, make, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        blocks_to_checkpoint(make(), GradCheckpointing.model_validate({"enabled": True, **settings}))
    assert message in str(caught.value)
    assert len(caught.value.lines) == 1


class Counts(nn.Module):
    """Computes something else at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x)
        return y.relu() if self.calls % 2 else y.repeat(2, 1)[: len(x)].tanh().sigmoid()


def test_a_trial_finds_modules_that_do_not_repeat() -> None:
    with pytest.raises(InputError, match="a block computes something else when it is called again"):
        check_checkpointing(Blocks(make=Counts), ["blocks.0"], *batch())
    with pytest.raises(InputError, match=r"grad_checkpointing\.modules: the network never calls unused"):
        check_checkpointing(Blocks(), ["unused"], *batch())
    model = Blocks()
    check_checkpointing(model, ["blocks.0", "head"], *batch())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.blocks[0].gain, torch.ones(8))
