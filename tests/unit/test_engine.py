import copy

import pytest
import torch
from torch import nn

from distributed.config.tree import Ddp, Sgd
from distributed.data.pipeline import Batch
from distributed.engine.ddp import DdpEngine
from distributed.loop import train_step
from distributed.optim import build_optimizer
from distributed.sums import RunningSums

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, images: torch.Tensor, sample_keys: torch.Tensor | None = None) -> torch.Tensor:
        return self.out(self.norm(self.conv(images)).relu().mean((2, 3)))


def engine_of(precision: str = "float64", **optim: object) -> DdpEngine:
    torch.manual_seed(0)
    images, keys = torch.zeros(2, 3, 6, 6), torch.zeros(2, 2, dtype=torch.int64)
    return DdpEngine(
        Ddp(), Small(), optim=Sgd(**optim), precision=precision, channels_last=True, device=CPU, example=(images, keys),
        timeout_seconds=10,
    )  # fmt: skip


def batch_of(count: int, step_size: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Batch(images, labels, torch.arange(count), torch.zeros(count, 2, dtype=torch.int64), step_size)


def stepped(engine: DdpEngine, batches: list[Batch], lr: float = 0.1) -> torch.Tensor:
    return train_step(engine, batches, lr=lr, step=0, sums=RunningSums(CPU))


def weights(engine: DdpEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


def test_a_step_is_that_of_the_mean_loss():
    engine = engine_of(momentum=0.0, nesterov=False, weight_decay=0.0)
    batch = batch_of(8, 8)
    model = copy.deepcopy(engine.model)
    torch.nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    before = weights(engine)
    norm = stepped(engine, [batch], lr=0.3)
    assert torch.allclose(weights(engine), before - 0.3 * gradient, rtol=1e-12, atol=1e-15)
    assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert all(p.grad is None for p in engine.model.parameters())


def test_micro_batches_of_any_size_weigh_by_their_samples():
    engine, whole = engine_of(weight_decay=0.0), engine_of(weight_decay=0.0)
    batch = batch_of(9, 9)
    for used in (engine, whole):
        used.model.eval()  # batch norm would see other batches
    parts = [
        Batch(batch.images[a:b], batch.labels[a:b], batch.sample_ids[a:b], batch.sample_keys[a:b], 9)
        for a, b in ((0, 2), (2, 9))
    ]
    stepped(engine, parts)
    stepped(whole, [batch])
    assert torch.allclose(weights(engine), weights(whole), rtol=1e-12, atol=1e-15)


def test_a_large_gradient_is_scaled_down_to_the_asked_norm_and_a_small_one_stays():
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    moves = {}
    for clip in (None, 1e-3, 1e3):
        engine = engine_of(**plain, clip_norm=clip)
        before = weights(engine)
        norm = stepped(engine, [batch_of(8, 8)], lr=1.0)
        moves[clip] = float((weights(engine) - before).norm())
        assert float(norm) == pytest.approx(moves[None], rel=1e-9)
    assert moves[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moves[1e3] == pytest.approx(moves[None], rel=1e-12)


def test_the_state_of_one_engine_continues_another_to_the_bit():
    first, second = engine_of(), engine_of()
    for seed in range(3):
        stepped(first, [batch_of(8, 8, seed)])
    second.load_state({name: tensor.clone() for name, tensor in first.state()})
    for engine in (first, second):
        stepped(engine, [batch_of(8, 8, 7)])
    assert {name for name, _ in second.state()} == {name for name, _ in first.state()}
    found = dict(second.state())
    assert all(torch.equal(found[name], tensor) for name, tensor in first.state())


def test_a_loaded_state_forgets_momentum_that_it_does_not_have():
    fresh, used = engine_of(), engine_of()
    initial = {name: tensor.clone() for name, tensor in fresh.state()}
    stepped(used, [batch_of(8, 8)])
    used.load_state(initial)
    for engine in (fresh, used):
        stepped(engine, [batch_of(8, 8, 1)])
    assert torch.equal(weights(used), weights(fresh))


def test_names_are_canonical():
    engine = engine_of()
    stepped(engine, [batch_of(8, 8)])
    names = {name for name, _ in engine.state()}
    assert {"model.conv.weight", "model.norm.running_mean", "optimizer.out.bias.momentum_buffer"} <= names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.out.bias"), r"model\.out\.bias: here \(10,\), there nothing"),
        (lambda t: t.update({"model.out.bias": torch.zeros(3)}), r"model\.out\.bias: here \(10,\), there \(3,\)"),
        (lambda t: t.update({"model.extra": torch.zeros(3)}), r"model\.extra: not known here"),
        (
            lambda t: t.update({"optimizer.extra.momentum_buffer": torch.zeros(3)}),
            r"optimizer\.extra.*no such parameter",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(change, said):
    engine = engine_of()
    tensors = {name: tensor + 1 for name, tensor in engine.state()}
    change(tensors)
    before = weights(engine)
    with pytest.raises(ValueError, match=said):
        engine.load_state(tensors)
    assert torch.equal(weights(engine), before)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)]
)
def test_weights_have_the_type_of_the_precision(precision, dtype):
    engine = engine_of(precision)
    assert {p.dtype for p in engine.model.parameters()} == {dtype}
    with engine.micro_step(sync=True):
        logits = engine.model(torch.zeros(2, 3, 6, 6, dtype=dtype))
    assert logits.dtype == (torch.bfloat16 if precision == "bfloat16" else dtype)


@pytest.mark.parametrize(("everything", "decayed"), [(False, {"conv.weight", "out.weight"}), (True, None)])
def test_biases_and_norms_decay_only_if_asked(everything, decayed):
    model = Small()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(Sgd(weight_decay=0.5, decay_norm_and_bias=everything), model, lr=0.1)
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert by_decay[0.5] == (decayed or set(names.values()))
    assert set().union(*by_decay.values()) == set(names.values())
