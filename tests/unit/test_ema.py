"""Exponential moving average of weights and batch-norm statistics."""

import pytest
import torch
from torch import nn

from distributed.optim.ema import WeightEMA


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def test_averages_weights_and_statistics() -> None:
    model = small_model()
    ema = WeightEMA(model.state_dict(), decay=0.5)
    names = ("0.weight", "1.running_mean")
    expected = {name: model.state_dict()[name].double().clone() for name in names}
    for step in range(9):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name]
    for name in names:
        assert torch.allclose(ema.tensors[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert "1.num_batches_tracked" not in ema.tensors


def test_a_decay_close_to_1_is_exact_for_a_step_as_tensor() -> None:
    """CUDA graphs pass the step as a tensor. In float32, 1 - 0.9999999 would be off by 19 %."""
    weights = torch.zeros(3, dtype=torch.float64)
    one, other = (WeightEMA({"weight": weights.clone()}, decay=0.9999999) for _ in range(2))
    for ema, step in ((one, 10**9), (other, torch.tensor(10**9))):
        ema._live["weight"].add_(1)
        ema.update(step)
    assert torch.allclose(one.tensors["weight"], other.tensors["weight"], rtol=1e-9, atol=0)
    assert torch.allclose(one.tensors["weight"], torch.tensor(1e-7, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [0, torch.tensor(0)])
def test_infinities_of_a_buffer_are_kept(step: int | torch.Tensor) -> None:
    """Of an attention mask: infinity minus infinity would be NaN."""
    mask = torch.tensor([0.0, float("-inf")])
    ema = WeightEMA({"mask": mask, "weight": torch.zeros(2)}, decay=0.5)
    ema._live["weight"].add_(1)
    ema.update(step)
    assert ema.tensors["mask"].tolist() == mask.tolist()
    assert torch.allclose(ema.tensors["weight"], torch.full((2,), 0.9))
