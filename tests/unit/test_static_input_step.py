"""A step with its inputs in fixed memory, as in a CUDA graph, is bit-identical to a plain step. Mostly without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.build import build_data, build_engine
from distributed.config import TrainConfig
from distributed.data.pipeline import DataPipeline
from distributed.engine.protocol import Engine
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.static_input_step import StaticInputStep
from distributed.training.step_function import build_step
from distributed.training.steps import train_step
from distributed.training.totals import Totals, TotalsAccumulator

CPU = torch.device("cpu")
RATES = (0.125, 0.0625, 0.25, 0.03125, 0.5, 0.125)  # the same in float32 and in double
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw, clipped": {"optim": {"name": "adamw", "max_grad_norm": 0.5}},
    "float16": {"precision": "float16", "global_batch_size": 4, "data": {"train_samples": 10}},
    "grad_accum_steps": {"grad_accum_steps": 2},
    "mixed": {"data": {"augment": {"mixup": 0.4, "cutmix": 1.0, "cutout": 4}}},
    "exact": {"exact": {"shards": 4}},
    "low resolution": {
        "model": {"name": "fast_alexnet", "widths": [4, 8, 8]},
        "data": {"augment": {"low_res_epochs": 1, "low_res_side": 20}},
    },
}


def config_of(**settings: Any) -> TrainConfig:
    data = {"name": "generated10", "train_samples": 40, "test_samples": 10, "validation_fraction": 0.0}
    values = {
        "run_dir": Path("unused"), "device": "cpu", "threads": 1, "global_batch_size": 16, "precision": "float32",
        "exact": {"shards": 0}, "model": {"name": "improved_alexnet"}, **settings, "data": data | settings.get("data", {}),
    }  # fmt: skip
    return TrainConfig.model_validate(values)


def parts_of(config: TrainConfig) -> tuple[DataPipeline, Engine, TotalsAccumulator]:
    data = build_data(config, Topology(), CPU)
    return data, build_engine(config, Topology(), data, CPU), TotalsAccumulator(CPU)


def after_two_epochs(config: TrainConfig, *, fixed: bool) -> tuple[dict[str, torch.Tensor], list[float], Totals]:
    """The final state, the gradient norm of each step and the totals. The last step of an epoch has 8 images."""
    data, engine, metrics = parts_of(config)
    step: Any = build_step(config, engine, metrics, CPU, build_losses(config.loss).training)
    if fixed:
        step = StaticInputStep(engine, metrics, loss=build_losses(config.loss).training, device=CPU, capture=False)
    rates, norms = iter(RATES), []
    for epoch in (0, 1):
        for micro_batches in data.train_epoch(epoch):
            norms.append(float(step(micro_batches, lr=next(rates) / 8, step=len(norms))))
    return {name: tensor.clone() for name, tensor in engine.state()}, norms, metrics.read()


@pytest.mark.parametrize("case", CASES)
def test_steps_in_fixed_memory_are_bit_identical(case: str) -> None:
    config = config_of(**CASES[case])
    plain, fixed = (after_two_epochs(config, fixed=fixed) for fixed in (False, True))
    assert len(plain[1]) == len(RATES)
    assert fixed[1:] == plain[1:]
    assert [name for name, tensor in plain[0].items() if not torch.equal(fixed[0][name], tensor)] == []


def test_ema_with_the_step_on_the_device_is_bit_identical() -> None:
    config = config_of(optim={"name": "sgd", "ema_decay": 0.9, "lr": 0.1})
    plain, fixed = (after_two_epochs(config, fixed=fixed)[0] for fixed in (False, True))
    averages = [name for name in plain if name.startswith("ema.")]
    assert averages
    for name in averages:
        torch.testing.assert_close(fixed[name], plain[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(plain[name], plain[name.replace("ema.", "model.")])


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    config = config_of(model={"name": "improved_alexnet", "dropout": 0.0})
    data, engine, metrics = parts_of(config)
    step = StaticInputStep(engine, metrics, loss=build_losses(config.loss).training, device=CPU, capture=False)
    for number, micro_batches in enumerate(data.train_epoch(0)):
        if number == 1:
            micro_batches[0].images.fill_(torch.inf)
        step(micro_batches, lr=0.1, step=7 + number)
    assert metrics.read().first_bad_step == 8


@pytest.mark.parametrize("augmented_at_once", [2, 3, 9])
@pytest.mark.parametrize("case", ["sgd", "grad_accum_steps", "mixed"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_images_augmented_together_are_bit_identical(augmented_at_once: int, case: str, placement: str) -> None:
    settings = dict(CASES[case])
    settings["data"] = {**settings.get("data", {}), "placement": placement}
    data = build_data(config_of(**settings), Topology(), CPU)
    assert data.augmented_at_once == 1
    expected = list(data.train_epoch(3, start_step=1))
    data.augmented_at_once = augmented_at_once
    found = list(data.train_epoch(3, start_step=1))
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert (ours.global_count, ours.shard_sizes) == (theirs.global_count, theirs.shard_sizes)
            for name in ("images", "labels", "sample_ids", "sample_keys"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert (ours.mixed is None) == (theirs.mixed is None)
            for a, b in zip(ours.mixed or (), theirs.mixed or (), strict=True):
                assert torch.equal(a, b)
            assert ours.images.stride() == theirs.images.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES)
def test_captured_steps_are_bit_identical(case: str) -> None:
    from distributed.training.determinism import make_deterministic

    cuda, found = torch.device("cuda", 0), []
    make_deterministic(cuda, precision="bfloat16")
    for capture in (False, True):
        config = config_of(**{"precision": "bfloat16", **CASES[case]}).model_copy(update={"device": "cuda"})
        data = build_data(config, Topology(), cuda)
        engine, metrics = build_engine(config, Topology(), data, cuda), TotalsAccumulator(cuda)
        step = StaticInputStep(engine, metrics, loss=build_losses(config.loss).training, device=cuda, capture=capture)
        norms = []
        for epoch in range(5):
            for micro_batches in data.train_epoch(epoch):
                norms.append(float(step(micro_batches, lr=0.01, step=len(norms))))
        found.append((norms, metrics.read(), {name: tensor.cpu() for name, tensor in engine.state()}))
    eager, recorded = found
    assert recorded[:2] == eager[:2]
    assert [name for name, tensor in eager[2].items() if not torch.equal(recorded[2][name], tensor)] == []


def test_a_cpu_uses_the_plain_step() -> None:
    config = config_of()
    _, engine, metrics = parts_of(config)
    assert build_step(config, engine, metrics, CPU, build_losses(config.loss).training).func is train_step  # type: ignore[attr-defined]
