"""The optimizers take the same steps as torch's; weight-decay groups."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed.config.optim import AdamW, Sgd
from distributed.optim.optimizer import Optimizer


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10))


def assert_same_steps(optimizer: Optimizer, torchs: torch.optim.Optimizer, torchs_parameters: list[Tensor]) -> None:
    for lr in (0.1, 0.3, 0.05):
        for p, q in zip(optimizer.parameters, torchs_parameters, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step(lr)
        for group in torchs.param_groups:
            group["lr"] = lr
        torchs.step()
        assert all(map(torch.equal, optimizer.parameters, torchs_parameters))


@pytest.mark.parametrize("momentum", [{"momentum": 0.0, "nesterov": False}, {"momentum": 0.9, "nesterov": False}, {}])
def test_sgd_takes_torchs_steps(momentum: dict[str, Any]) -> None:
    config = Sgd(weight_decay=0.01, decay_norm_and_bias=True, **momentum)
    optimizer, parameters = Optimizer(config, list(small_model().parameters())), list(small_model().parameters())
    torchs = torch.optim.SGD(
        parameters, lr=1.0, momentum=config.momentum, nesterov=config.nesterov, weight_decay=0.01, fused=True
    )
    assert_same_steps(optimizer, torchs, parameters)


@pytest.mark.parametrize("decay_all", [True, False])
def test_adamw_takes_torchs_steps(decay_all: bool) -> None:
    config = AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, decay_norm_and_bias=decay_all)
    optimizer, parameters = Optimizer(config, list(small_model().parameters())), list(small_model().parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1 or decay_all], "weight_decay": 0.1},
        {"params": [p for p in parameters if not (p.dim() > 1 or decay_all)], "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=(0.8, 0.95), eps=1e-6, fused=True)
    assert_same_steps(optimizer, torchs, parameters)
    torchs_names = {name for p in parameters for name in torchs.state[p]}
    assert torchs_names == {name for state in optimizer.state.values() for name in state}


@pytest.mark.parametrize(("decay_all", "decayed"), [(False, {"0.weight", "2.weight"}), (True, None)])
def test_biases_and_norms_decay_only_if_set(decay_all: bool, decayed: set[str] | None) -> None:
    model = small_model()
    config = Sgd(weight_decay=0.5, decay_norm_and_bias=decay_all, momentum=0.0, nesterov=False)
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(config, list(model.parameters())).step(0.1)
    shrunk = {name for name, p in model.named_parameters() if torch.equal(p, torch.full_like(p, 2.0 * (1 - 0.1 * 0.5)))}
    unchanged = {name for name, p in model.named_parameters() if torch.equal(p, torch.full_like(p, 2.0))}
    names = {name for name, _ in model.named_parameters()}
    assert shrunk == (decayed or names)
    assert unchanged == names - shrunk


def test_zero_grad_drops_gradients() -> None:
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(Sgd(), list(model.parameters())).zero_grad()
    assert all(p.grad is None for p in model.parameters())
