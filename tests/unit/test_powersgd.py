"""PowerSGD of one process: nobody to send to, the same approximation and the same error feedback."""

import pytest
import torch
from torch import Tensor

from distributed.engine import powersgd
from distributed.engine.powersgd import PowerSgd, pays

SHAPES = {"fc.weight": (24, 40), "fc.bias": (24,), "conv.weight": (16, 8, 3, 3), "small.weight": (4, 4)}


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    made["conv.weight"] = made["conv.weight"].to(memory_format=torch.channels_last)
    return made


def give(held: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    for name, parameter in held.items():
        parameter.grad = torch.empty_like(parameter).copy_(gradients[name])


def random_gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def rank_of(gradient: Tensor) -> int:
    return int(torch.linalg.matrix_rank(gradient.reshape(len(gradient), -1).double(), rtol=1e-5))


def test_matrices_that_it_pays_for_are_of_low_rank_and_the_rest_is_as_it_was():
    held, given = parameters(), random_gradients(0)
    give(held, given)
    PowerSgd(held, columns=2, seed=0).reduce()
    assert torch.equal(held["fc.bias"].grad, given["fc.bias"])
    assert torch.equal(held["small.weight"].grad, given["small.weight"])
    assert rank_of(held["fc.weight"].grad) == rank_of(held["conv.weight"].grad) == 2
    assert held["conv.weight"].grad.is_contiguous(memory_format=torch.channels_last)


def test_what_was_applied_and_the_error_that_is_left_add_up_to_the_gradients():
    held = parameters()
    compressed, applied, truth = PowerSgd(held, columns=1, seed=0), parameters(), parameters()
    for seed in range(7):
        given = random_gradients(seed)
        give(held, given)
        compressed.reduce()
        for name, parameter in held.items():
            applied[name] += parameter.grad
            truth[name] += given[name]
    left = dict(compressed.state())
    for name in ("fc.weight", "conv.weight"):
        (error,) = left[f"compression.{name}.error"]
        assert float(error.norm()) > 1.0
        assert torch.allclose(applied[name] + error.view(SHAPES[name]), truth[name], rtol=1e-12, atol=1e-12)


def test_the_same_gradient_again_and_again_is_found_by_the_warm_start():
    """Power iteration: the error of the best approximation of that rank is approached, which one random start is far from."""
    held = parameters()
    compressed = PowerSgd(held, columns=2, seed=0)
    gradient = random_gradients(0)
    u, s, v = torch.linalg.svd(gradient["fc.weight"], full_matrices=False)
    gradient["fc.weight"] = u @ torch.diag(0.6 ** torch.arange(len(s), dtype=torch.float64)) @ v
    best = float(0.6**2 / (1 - 0.6**2) ** 0.5)
    missed = []
    for _ in range(12):
        for factored in compressed._factored:
            factored.error.zero_()
        give(held, gradient)
        compressed.reduce()
        missed.append(float((held["fc.weight"].grad - gradient["fc.weight"]).norm()))
    assert missed[-1] == pytest.approx(best, rel=1e-3)
    assert missed[0] > 1.2 * best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_columns_that_depend_on_one_another_and_zeros_do_no_harm(dtype, scale):
    """A gradient of one direction, and none at all in between, of which the factors hold nothing to begin from."""
    held, accuracy = parameters(dtype), 1e-5 if dtype == torch.float32 else 1e-13
    compressed = PowerSgd(held, columns=4, seed=0)
    line = torch.outer(torch.arange(24.0), torch.arange(40.0) - 7).double() * scale
    applied = torch.zeros(24, 40, dtype=torch.float64)
    for due in (0, 1, 1, 0, 1, 1):
        give(held, {name: torch.zeros(shape) for name, shape in SHAPES.items()} | {"fc.weight": due * line})
        compressed.reduce()
        applied += held["fc.weight"].grad
    assert float((applied - 4 * line).norm() / line.norm()) < accuracy
    assert float(compressed._factored[0].error.norm() / line.norm()) < accuracy


def test_the_first_factors_are_functions_of_seed_and_name():
    first, again, other = (dict(PowerSgd(parameters(), columns=2, seed=seed).state()) for seed in (3, 3, 4))
    name = "compression.fc.weight.q"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert rank_of(first[name]) == 2


def test_with_all_columns_nothing_is_left_out(monkeypatch):
    monkeypatch.setattr(powersgd, "pays", lambda shape, columns: len(shape) == 2)
    held = {"fc.weight": torch.zeros(24, 40, dtype=torch.float64)}
    given = random_gradients(1)
    give(held, given)
    PowerSgd(held, columns=24, seed=0).reduce()
    assert torch.allclose(held["fc.weight"].grad, given["fc.weight"], rtol=1e-12, atol=1e-13)


def test_it_pays_where_half_is_saved_at_least():
    assert [pays((4, 4), 1), pays((3, 7), 1), pays((512, 1024), 4), pays((24, 40), 7), pays((24, 40), 8)] == [
        True, True, True, True, False,
    ]  # fmt: skip
    assert not pays((1000,), 1)
    assert not pays((), 1)


def test_a_state_goes_on_where_it_was_and_none_begins_anew():
    held = parameters()
    used, other = (PowerSgd(held, columns=2, seed=0) for _ in range(2))
    initial = {name: tensor.clone() for name, tensor in other.state()}
    for seed in range(3):
        give(held, random_gradients(seed))
        used.reduce()
    saved = {name: tensor.clone() for name, tensor in used.state()}
    found = []
    for compressed in (used, other):
        compressed.load(saved)
        give(held, random_gradients(9))
        compressed.reduce()
        found.append(held["conv.weight"].grad.clone())
    assert torch.equal(*found)
    used.load({})
    assert all(torch.equal(initial[name], tensor) for name, tensor in used.state())


def test_misfits_are_named():
    compressed = PowerSgd(parameters(), columns=2, seed=0)
    saved = {name: tensor.clone() for name, tensor in PowerSgd(parameters(), columns=3, seed=0).state()}
    assert compressed.misfits(saved) == [
        "compression.fc.weight.q: here (40, 2), there (40, 3)",
        "compression.conv.weight.q: here (72, 2), there (72, 3)",
    ]
    assert compressed.misfits({"compression.x.q": torch.zeros(1, 1)}) == ["compression.x.q: here nothing, there (1, 1)"]
    assert compressed.misfits(dict(compressed.state())) == []
