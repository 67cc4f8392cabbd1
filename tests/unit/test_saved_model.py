"""A throwaway pass leaves a model and the random generators as they were, and changes are named."""

import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed.errors import InputError
from distributed.exact.check.saved_model import SavedModel, same_bits, unchanged
from distributed.exact.check.supported import changed_by_forward, check_exact, mixes_samples
from distributed.exact.shardable_layers import layers_to_shard

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@dataclass
class Cache:
    seen: list[int] = field(default_factory=list)
    scale: float = 1.0


class Restless(nn.Module):
    """Changes everything that a forward may change, and cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.bare = nn.BatchNorm2d(2, track_running_stats=False)
        self.average = nn.BatchNorm2d(2, momentum=None)
        self.head = nn.Linear(72, 5)
        self.register_buffer("total", torch.tensor(1.0))
        self.register_buffer("hidden", torch.zeros(2, 2), persistent=False)
        self.calls = 0
        self.history: list[Tensor] = [torch.ones(2)]
        self.cache = Cache()
        self.table = {"draw": 0.0}

    def __deepcopy__(self, memo: object) -> "Restless":
        raise TypeError("cannot be copied")

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.total += 1
        self.hidden.data.fill_(random.random())
        self.history[0].add_(1)
        self.history.append(images)
        self.table = {"draw": np.random.rand()}
        self.cache.seen.append(1)
        self.cache.scale *= 2
        self.new = torch.rand(2)
        self.conv.bias.data += torch.rand(2)
        self.head.weight.data = self.head.weight.data * 2
        self.norm.eval()
        x = self.average(self.bare(self.norm(self.conv(images.mul_(2)))))
        return self.head(x.flatten(1))


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def everything(model: Restless) -> dict[str, object]:
    norms = (model.norm, model.bare, model.average)
    return {
        **{f"state {name}": bits(value) for name, value in model.state_dict().items()},
        **{f"grad {name}": bits(value.grad) for name, value in model.named_parameters()},
        **{f"flag {name}": module.training for name, module in model.named_modules()},
        "hidden": bits(model.hidden),
        "attributes": sorted(vars(model)),
        "simple": (model.calls, dict(model.table), model.cache.scale),
        "lists": ([bits(tensor) for tensor in model.history], list(model.cache.seen)),
        "batch norm": [(m.momentum, m.track_running_stats, m.running_mean is None) for m in norms],
        "global": (bits(torch.get_rng_state()), random.getstate(), pickle.dumps(np.random.get_state())),
    }


def restless() -> Restless:
    model = Restless()
    model.conv.eval()
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    return model


def refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="keeps state"):
        check_exact(model, images)


@pytest.mark.parametrize("check", [refused, mixes_samples, layers_to_shard], ids=lambda check: check.__name__)
def test_passes_leave_the_model_as_it_was(check: Callable[[nn.Module, Tensor], object]) -> None:
    model, images = restless(), IMAGES.clone()
    before, identities = everything(model), [(id(p), p.data_ptr(), id(p.grad)) for p in model.parameters()]
    check(model, images)
    assert everything(model) == before
    assert [(id(p), p.data_ptr(), id(p.grad)) for p in model.parameters()] == identities
    assert torch.equal(images, IMAGES)


def test_a_failing_pass_restores_the_model_too() -> None:
    model = restless()
    before = everything(model)
    with pytest.raises(RuntimeError):
        mixes_samples(model, IMAGES[:, :2])
    assert everything(model) == before
    handles = torch.nn.modules.module
    assert not handles._global_forward_hooks
    assert not handles._global_forward_pre_hooks


def test_changes_are_named_and_batch_norm_is_left_out() -> None:
    model = restless()
    with unchanged(model) as saved:
        model.train()
        assert saved.changes() == {}
        model(IMAGES.clone())
        changes = saved.changes()
    assert set(changes.pop("")) == {"cache", "calls", "hidden", "history", "new", "table", "total"}
    assert changes == {"conv": ["bias"], "head": ["weight"]}
    assert SavedModel(model).changes() == {}


def test_same_bits() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    for dtype in (torch.bool, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.uint8):
        assert same_bits(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype))
        assert not same_bits(torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype))
    assert same_bits(torch.ones(2, 3).t(), torch.ones(3, 2))


def test_read_only_arrays_are_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    model.table = np.frombuffer(b"1234", np.uint8)
    check_exact(model, IMAGES)
    assert mixes_samples(model, IMAGES) == ""


class Counts(nn.Module):
    """Counts its forward passes where a checkpoint has it, or where it does not."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.conv, self.buffer = nn.Conv2d(3, 2, 3), buffer
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.buffer:
            self.calls += 1
        else:
            self.seen += 1
        return self.conv(images).mean((2, 3))


def test_what_a_forward_pass_changes_is_named() -> None:
    counts = Counts(buffer=False)
    assert changed_by_forward(nn.Sequential(counts), IMAGES) == ["0.seen"]
    assert counts.seen == 0
    assert changed_by_forward(Counts(buffer=True), IMAGES) == ["calls"]
    assert changed_by_forward(nn.BatchNorm2d(3), IMAGES) == []
