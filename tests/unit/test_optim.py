"""AdamW and the moving average of the weights; SGD stands in test_engine.py."""

import pytest
import torch
from torch import nn

from distributed.config.sections import AdamW, Sgd
from distributed.engine.model_state import ModelState
from distributed.optim.optimizer import Optimizer, WeightEMA


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


@pytest.mark.parametrize("everything", [True, False])
def test_adamw_takes_the_steps_of_torchs(everything):
    models = [small(), small()]
    config = AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, decay_norm_and_bias=everything)
    own = Optimizer(config, list(models[0].parameters()))
    parameters = list(models[1].parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1 or everything], "weight_decay": 0.1},
        {"params": [p for p in parameters if not (p.dim() > 1 or everything)], "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=(0.8, 0.95), eps=1e-6, fused=True)
    for lr in (0.1, 0.3, 0.05):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        own.step(lr)
        for group in torchs.param_groups:
            group["lr"] = lr
        torchs.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q)
    assert {name for p in parameters for name in torchs.state[p]} == {n for state in own.state.values() for n in state}


def test_the_average_is_the_exponential_one_of_weights_and_statistics():
    model = small()
    average = WeightEMA(model.state_dict(), decay=0.5)
    names = ("0.weight", "1.running_mean")
    expected = {name: model.state_dict()[name].double().clone() for name in names}
    for step in range(9):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
        average.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        for name in names:
            expected[name] = kept * expected[name] + (1 - kept) * model.state_dict()[name]
    for name in names:
        assert torch.allclose(average.tensors[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert "1.num_batches_tracked" not in average.tensors


def test_the_model_evaluates_with_the_averages_and_has_its_weights_back_after_that():
    model = small()
    weights = ModelState(Sgd(ema_decay=0.9), model)
    before = model[0].weight.detach().clone()
    weights.average.tensors["0.weight"].fill_(7.0)
    with weights.evaluated():
        assert not model.training
        assert bool((model[0].weight == 7).all())
    assert model.training
    assert torch.equal(model[0].weight, before)


def test_a_state_without_averages_begins_them_at_its_weights_and_the_optimizer_at_nothing():
    weights = ModelState(AdamW(ema_decay=0.9), small())
    for parameter in weights.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights.update(0.1, step=0)
    state = {name: tensor.clone() for name, tensor in weights.state()}
    assert float(state["optimizer.0.weight.step"]) == 1
    weights.load({name: tensor for name, tensor in state.items() if name.startswith("model.")})
    found = dict(weights.state())
    assert torch.equal(found["ema.0.weight"], state["model.0.weight"])
    assert not torch.equal(state["ema.0.weight"], state["model.0.weight"])
    assert all(not tensor.any() for name, tensor in found.items() if name.startswith("optimizer."))
    weights.load(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.state())


def test_without_a_decay_nothing_more_is_kept():
    assert not any(name.startswith("ema.") for name, _ in ModelState(Sgd(), small()).state())
