"""The optimizers take the same steps as torch's; weight-decay groups."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed.config.optim import AdamW, Muon, Sgd
from distributed.optim.muon import orthogonalized
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


def test_biases_and_norms_have_their_own_learning_rate() -> None:
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    Optimizer(Sgd(bias_lr_factor=8.0, weight_decay=0.0), list(model.parameters())).step(0.5)
    for parameter, old in zip(model.parameters(), before, strict=True):
        factor = 1.0 if parameter.dim() > 1 else 8.0
        assert torch.equal(parameter, old - 0.5 * factor * 1.9)  # Nesterov: 1 + momentum


# Muon


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonal_updates_have_equal_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalized(matrix) @ right.T
    values = found.diagonal()
    assert values.min() > (0.15 if shape == (24, 24) else 0.6)  # a square matrix has values close to 0
    assert values.max() < 1.25
    assert torch.allclose(found, values.diag(), atol=1e-8), "other singular vectors"


def test_muon_takes_torchs_steps_on_matrices() -> None:
    weights = [torch.randn(6, 10, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)]
    last, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    config = Muon(momentum=0.7, weight_decay=0.2, adamw_lr=0.02, bias_lr_factor=3.0, lr=0.1)
    own = [tensor.clone() for tensor in (*weights, last, bias)]
    optimizer = Optimizer(config, own)
    torchs = torch.optim.Muon(weights, momentum=0.7, weight_decay=0.2, nesterov=True, ns_steps=3)
    groups = [{"params": [last]}, {"params": [bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.2, fused=True)
    for lr in (0.1, 0.05, 0.02):
        for p, q in zip(own, (*weights, last, bias), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step(lr)
        torchs.param_groups[0]["lr"] = lr
        adamw.param_groups[0]["lr"], adamw.param_groups[1]["lr"] = 0.2 * lr, 0.6 * lr
        torchs.step()
        adamw.step()
    for found, expected in zip(own, (*weights, last, bias), strict=True):
        assert torch.allclose(found, expected, atol=0.02 if found.dim() > 1 else 1e-12)


def moved(dtype: torch.dtype, muon_dtype: torch.dtype | None = None) -> Tensor:
    """Return by how much a step of Muon moves the same matrix in a dtype."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(6, 10, generator=generator).to(dtype) for _ in range(2))
    before, head = weight.clone(), torch.zeros(2, 2, dtype=dtype)
    weight.grad, head.grad = gradient, torch.zeros_like(head)
    Optimizer(Muon(weight_decay=0.0), [weight, head], muon_dtype=muon_dtype).step(1.0)
    return (before - weight).double()


def test_muon_multiplies_in_the_dtype_it_is_given() -> None:
    exact = moved(torch.float64)
    assert torch.allclose(moved(torch.float32), exact, atol=1e-5)
    error = (moved(torch.float32, torch.bfloat16) - exact).abs().max()
    assert 1e-4 < error < 0.03


def test_filters_are_updated_as_matrices() -> None:
    weight = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(weight)
    matrix, head = weight.reshape(8, 27).clone(), torch.zeros(2, 2)
    weight.grad, matrix.grad, head.grad = gradient, gradient.reshape(8, 27), torch.zeros(2, 2)
    Optimizer(Muon(), [weight, head]).step(0.3)
    Optimizer(Muon(), [matrix, head]).step(0.3)
    assert torch.equal(weight.reshape(8, 27), matrix)


def test_muon_skips_a_step_with_an_overflow() -> None:
    parameters = [torch.randn(4, 6), torch.randn(2, 4), torch.randn(2)]
    optimizer = Optimizer(Muon(), parameters)
    before = [p.clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step(0.1, skip=torch.tensor(1.0))
    assert all(map(torch.equal, parameters, before))
    assert not any(tensor.any() for state in optimizer.state.values() for tensor in state.values())
