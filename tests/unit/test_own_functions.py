"""Losses, augmentations and metrics by import path: what they compute, and a line for everything that they can do wrong."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.configs import mistakes
from kit.own_functions import write_functions
from kit.small_runs import FAST, Recorder, small_config
from kit.user_modules import importable
from loguru import logger
from torch import Tensor

from distributed import rng
from distributed.build import build_data
from distributed.config import TrainConfig
from distributed.data.augment_function import Draws
from distributed.errors import InputError
from distributed.recipe import train
from distributed.topology import Topology
from distributed.training.functions import Functions, build_functions
from distributed.training.losses import per_shard
from distributed.training.totals import MetricSums

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def module(tmp_path: Path) -> Iterator[None]:
    write_functions(tmp_path)
    with importable(tmp_path):
        yield


def config_of(tmp_path: Path, **settings: object) -> TrainConfig:
    return small_config(tmp_path / "run", **settings)


def own_loss(function: str, **options: object) -> dict[str, object]:
    return {"name": f"own_functions:{function}", "options": options}


def checked(config: TrainConfig, topology: Topology | None = None) -> Functions:
    topology = topology or Topology()
    return build_functions(config, topology, build_data(config, topology, CPU), CPU)


def refused(config: TrainConfig) -> str:
    """Return the one line that refuses the config; nothing is left in the generators."""
    before = generators()
    with pytest.raises(InputError) as caught:
        checked(config)
    assert generators() == before
    (line,) = caught.value.lines
    return line


def generators() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


# (function, options, part of the line behind "loss.name = own_functions:FUNCTION: ")
LOSSES: list[tuple[str, dict[str, object], str]] = [
    ("number", {}, "own_functions.number is of type int; name a function or class that returns one loss per sample"),
    ("focl", {}, "own_functions has no focl; did you mean focal?"),
    ("one_argument", {}, "the function should accept logits and targets by position"),
    ("needs_gamma", {}, "the function needs the argument gamma; set loss.options.gamma"),
    ("focal", {"gama": 1}, "the function does not accept loss.options.gama; did you mean gamma?"),
    ("focal", {"targets": 1}, "the function does not accept loss.options.targets; it accepts gamma"),
    ("passes_on", {"gama": 1}, "unexpected keyword argument 'gama'"),
    ("mean", {}, "returns a scalar; it should return one loss per sample, a tensor of shape [5] for 5 samples"),
    ("column", {}, "returns shape [5, 1]; it should return one loss per sample"),
    ("squeezed", {}, "returns shape [] for 1 sample; it should return [1]"),
    ("wrong", {}, "returns torch.bool; it should return torch.float32: .float()"),
    ("half", {}, "returns torch.bfloat16; it should return torch.float32"),
    ("text", {}, "returns an object of type str"),
    ("nothing", {}, "returns None"),
    ("fails", {}, "fails on logits [5, 10] and targets [5]: ValueError: no way ("),
    ("exits", {}, "fails on logits [5, 10] and targets [5]: SystemExit: 3 ("),
    ("wrong_float", {}, "no gradient flows from the losses to the logits"),
    ("weighted", {}, "the function fails on other logits and targets: IndexError: index 9 is out of bounds"),
    ("learned", {}, "a tensor of shape [1] in the function requires a gradient, but only the network's parameters are"),
    ("no_backward", {}, "the backward pass of the loss fails: RuntimeError: not written yet ("),
    ("centered", {}, "the result for one sample depends on the others, which exact mode does not support"),
    ("scaled", {}, "the result for one sample depends on the others"),
    ("of_first", {}, "the result for one sample depends on the others"),
    ("noisy", {}, "draws from torch's generator, which no resumed run could repeat"),
    ("dropped", {}, "draws from torch's generator"),
    ("lucky", {}, "draws from Python's generator"),
    ("counting", {}, "two calls with the same arguments differ"),
    ("in_place", {}, "the function changes its arguments"),
]


@pytest.mark.parametrize(("function", "options", "message"), LOSSES, ids=lambda value: str(value)[:40])
def test_each_mistake_in_a_loss_is_one_line(tmp_path, function, options, message):
    line = refused(config_of(tmp_path, loss=own_loss(function, **options)))
    assert line.startswith(f"loss.name = own_functions:{function}: ")
    assert message in line


@pytest.mark.parametrize("function", ["focal", "needs_gamma", "passes_on"])
def test_a_loss_gets_its_options(tmp_path, function):
    losses = checked(config_of(tmp_path, loss=own_loss(function, gamma=0))).loss
    logits, targets = torch.randn(4, 10), torch.arange(4)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(losses.training(logits, targets), expected)
    assert losses.evaluation is losses.training


@pytest.mark.parametrize("function", ["margin", "negative"])
def test_other_losses_are_accepted(tmp_path, function):
    checked(config_of(tmp_path, loss=own_loss(function)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float64"])
def test_a_loss_works_in_every_precision(tmp_path, precision):
    sink, exact = Recorder(), {"shards": 2}
    data, model = {"train_samples": 20, "test_samples": 10}, {"name": "fast_alexnet", "widths": [4, 8, 8]}
    config = config_of(
        tmp_path, loss=own_loss("focal"), precision=precision, exact=exact, global_batch_size=10, data=data, model=model
    )
    train(config, sinks=[sink])
    assert [step.step for step in sink.steps] == [1, 2, 3, 4]
    assert 0 < sink.epochs[-1].train_loss < 3


def test_a_loss_is_never_called_under_autocast(tmp_path):
    config = config_of(tmp_path, loss=own_loss("sees_three"), precision="bfloat16")
    with pytest.raises(InputError, match="fails on logits"):  # of five samples; it works with three
        checked(config)


def test_a_loss_is_called_twice_with_mixed_labels(tmp_path):
    curves = []
    for name in ("cross_entropy", "same"):
        sink = Recorder()
        loss = own_loss("focal", gamma=0) if name == "same" else {}
        data = {"augment": {"mixup": 0.4, "cutmix": 1.0}, "train_samples": 48}
        settings = {"data": data, "exact": FAST, "epochs": 1}
        train(small_config(tmp_path / name, loss=loss, **settings), sinks=[sink])
        curves.append([step.loss for step in sink.steps])
    assert curves[0] == curves[1]


def test_a_negative_loss_is_resumed(tmp_path):
    settings = {"loss": own_loss("negative"), "data": {"validation_fraction": 0.2}, "checkpoint": {"best_by": "loss"}}
    for epochs in (1, 2):
        sink = Recorder()
        train(config_of(tmp_path, epochs=epochs, **settings), sinks=[sink])
    assert [epoch.epoch for epoch in sink.epochs] == [1]
    assert sink.epochs[0].validation.loss < -90


def test_in_fast_mode_combined_samples_are_a_warning(tmp_path):
    lines: list[str] = []
    number = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        config = config_of(tmp_path, loss=own_loss("centered"), exact=FAST)
        checked(config)
        assert lines == []
        checked(config, Topology(rank=0, world_size=2))
    finally:
        logger.remove(number)
    (line,) = lines
    assert line.startswith(
        "loss.name = own_functions:centered: the result for one sample depends on the others, so results"
    )


def test_an_empty_shard_needs_no_call(tmp_path):
    loss = checked(config_of(tmp_path, loss=own_loss("focal"))).loss.training
    logits = torch.zeros(0, 10, requires_grad=True)
    loss(logits * 2, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None


# (function, part of the line behind "data.augment.function = own_functions:FUNCTION: ")
AUGMENTATIONS: list[tuple[str, str]] = [
    ("number", "is of type int; name a function or class that returns the changed images"),
    ("bright", "has no bright; did you mean brightness?"),
    ("only_images", "the function should accept images and draws by position"),
    ("more_images", "the function needs the argument strength; use functools.partial to set strength"),
    ("floats", "returns torch.float32 [5, 32, 32, 3] for images of shape [5, 32, 32, 3]; it should return torch.uint8"),
    ("smaller", "returns torch.uint8 [5, 31, 32, 3] for"),
    ("fewer", "returns torch.uint8 [1, 32, 32, 3] for"),
    ("no_images", "returns None for"),
    ("fails_on_images", "fails on images of shape [5, 32, 32, 3]: RuntimeError: shape '[3, 7]' is invalid"),
    ("shuffled", "the result for one image depends on the others in the batch"),
    ("normalized", "the result for one image depends on the others in the batch"),
    ("noise", "draws from torch's generator, which no resumed run could repeat; draw from the argument `draws`"),
    ("empty_range", "ValueError: draws.integers(3, 3): high should be above low"),
    ("no_numbers", "ValueError: draws of 0 numbers per image: draw at least 1"),
]


@pytest.mark.parametrize(("function", "message"), AUGMENTATIONS, ids=lambda value: str(value)[:40])
def test_each_mistake_in_an_augmentation_is_one_line(tmp_path, function, message):
    line = refused(config_of(tmp_path, data={"augment": {"function": f"own_functions:{function}"}}))
    assert line.startswith(f"data.augment.function = own_functions:{function}: ")
    assert message in line


def images_of(tmp_path: Path, function: str | None, **settings: object) -> Tensor:
    augment = {"crop": 0, "flip": False, "function": function and f"own_functions:{function}"}
    data = {"augment": augment, "normalize": "unit", **settings}
    pipeline = build_data(config_of(tmp_path, data=data), Topology(), CPU)
    batches = [batch for micro_batches in pipeline.train_epoch(1) for batch in micro_batches]
    return torch.cat([batch.images for batch in batches])


def test_an_augmentation_changes_the_images(tmp_path):
    plain, bright = images_of(tmp_path, None), images_of(tmp_path, "brightness")
    ratio = bright.mean((1, 2, 3)) / plain.mean((1, 2, 3))
    same = torch.tensor([torch.equal(one, other) for one, other in zip(plain, bright, strict=True)])
    assert 0.35 < same.float().mean() < 0.65
    assert 0.5 < float(ratio.min()) < 0.75 < 1.1 < float(ratio.max()) < 1.45


def test_an_augmentation_may_work_in_place(tmp_path):
    plain, shifted = images_of(tmp_path, None), images_of(tmp_path, "shifted")
    steps = ((shifted - plain) * 255).round().long() % 256
    assert torch.equal(steps, steps[:, :, :1, :1].expand_as(steps))
    assert set(steps.flatten().tolist()) == set(range(20))
    assert torch.equal(plain, images_of(tmp_path, None)), "the data itself is unchanged"


def test_evaluation_images_are_not_augmented(tmp_path):
    batches = []
    for function in (None, "own_functions:brightness"):
        data = {"augment": {"function": function}}
        pipeline = build_data(config_of(tmp_path, data=data), Topology(), CPU)
        batches.append(torch.cat([batch.images for batch in pipeline.evaluation("test")]))
    assert torch.equal(*batches)


def test_draws_are_uniform_and_independent():
    draws = Draws(rng.sample_keys(torch.arange(20_000), seed=3, epoch=1))
    first, second = draws.uniform(2), draws.uniform(2)
    numbers = torch.cat([first, second], dim=1)
    assert (numbers.dtype, numbers.shape, numbers.is_contiguous()) == (torch.float32, (20_000, 4), True)
    assert bool((numbers >= 0).all() and (numbers < 1).all())
    assert torch.allclose(numbers.mean(0), torch.tensor(0.5), atol=0.01)
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.03
    integers = draws.integers(-2, 3)
    assert (integers.dtype, integers.shape) == (torch.int64, (20_000, 1))
    counts = torch.bincount(integers[:, 0] + 2)
    assert len(counts) == 5
    assert bool((counts - 4000).abs().max() < 300)
    assert int(draws.integers(0, 2**31).max()) < 2**31


def test_a_draw_does_not_depend_on_the_batch():
    keys = rng.sample_keys(torch.arange(50), seed=0, epoch=0)
    entire, part = Draws(keys), Draws(keys[7:9])
    for _ in range(2):
        assert torch.equal(entire.uniform(3)[7:9], part.uniform(3))
        assert torch.equal(entire.integers(0, 1000)[7:9], part.integers(0, 1000))


# (function, part of the line behind "evaluation.metrics = own_functions:FUNCTION: ")
METRICS: list[tuple[str, str]] = [
    ("brie", "has no brie; did you mean brier?"),
    ("needs_gamma", "the function needs the argument gamma; use functools.partial to set gamma"),
    ("mean", "returns a scalar; it should return one number per sample"),
    ("wrong", "returns torch.bool; it should return torch.float32: .float()"),
    ("squeezed", "returns shape [] for 1 sample"),
    ("fails", "ValueError: no way ("),
    ("weighted", "the function fails on other logits and targets: IndexError: index 9 is out of bounds"),
    ("noisy", "draws from torch's generator"),
    ("scaled", "the result for one sample depends on the others, which exact mode does not support"),
    ("in_place", "the function changes its arguments"),
]


@pytest.mark.parametrize(("function", "message"), METRICS, ids=lambda value: str(value)[:40])
def test_each_mistake_in_a_metric_is_one_line(tmp_path, function, message):
    line = refused(config_of(tmp_path, evaluation={"metrics": [f"own_functions:{function}"]}))
    assert line.startswith(f"evaluation.metrics = own_functions:{function}: ")
    assert message in line


def test_metrics_are_means_over_a_split(tmp_path):
    names = ("brier", "confidence", "wrong_float", "sometimes_nan", "huge")
    sink = Recorder()
    evaluation = {"metrics": [f"own_functions:{name}" for name in names], "batch_size": 7}
    train(config_of(tmp_path, evaluation=evaluation, epochs=1), sinks=[sink])
    test = sink.epochs[-1].test
    assert tuple(test.metrics) == names
    assert test.metrics["wrong_float"] == pytest.approx(1 - test.accuracy)
    assert 0 < test.metrics["brier"] < 2
    assert 0.1 <= test.metrics["confidence"] < 1
    assert np.isnan([test.metrics["sometimes_nan"], test.metrics["huge"]]).all()


def test_sums_of_metrics_do_not_depend_on_the_grouping():
    values = torch.randn(1000, dtype=torch.float64) * 1000
    means = set()
    for size in (1, 7, 1000):
        sums = MetricSums(["one", "other"], CPU)
        for part in values.split(size):
            sums.add("other", part)
        means.add(sums.read()["other"])
    (mean,) = means
    assert mean == pytest.approx(float(values.mean()), abs=1e-9)


def test_functions_are_called_shard_by_shard():
    sizes = []

    def function(logits, targets):
        sizes.append(len(targets))
        return logits[:, 0] + targets

    logits, targets = torch.arange(12.0).view(6, 2), torch.arange(6)
    assert torch.equal(per_shard(function, logits, targets, (1, 0, 3, 2)), logits[:, 0] + targets)
    assert sizes == [1, 3, 2]
    assert per_shard(function, logits[:0], targets[:0], (0,)).shape == (0,)


def test_options_of_a_loss_that_is_not_named_are_refused():
    assert mistakes("--data.name=generated10", "--loss.options.gamma=2") == (
        "command line: loss.options.gamma = 2: belongs to loss.name = package.module:function, but here it is cross_entropy; "
        "remove one of them",
    )
    (line,) = mistakes("--data.name=generated10", "--loss.name=net:focal", "--loss.label_smoothing=0.1")
    assert line.endswith("belongs to loss.name = cross_entropy, but here it is net:focal; remove one of them")


# Losses that Python code gives


def test_a_loss_is_given_as_a_function(tmp_path):
    def doubled(logits, targets):
        return 2 * torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    sinks = Recorder(), Recorder()
    train(small_config(tmp_path / "plain", epochs=1, exact=FAST), sinks=[sinks[0]])
    result = train(small_config(tmp_path / "given", epochs=1, exact=FAST), loss=doubled, sinks=[sinks[1]])
    assert sinks[1].steps[0].loss == pytest.approx(2 * sinks[0].steps[0].loss)
    assert result.config.loss.name == "__main__:doubled"


def test_a_given_loss_of_a_module_is_named_by_its_path(tmp_path):
    import own_functions

    config = config_of(tmp_path, epochs=1, exact=FAST, loss=own_loss("focal", gamma=3))
    assert train(config, loss=own_functions.focal).config.loss == config.loss
    with pytest.raises(
        InputError, match=r"loss\.name = own_functions:margin: this run was started with own_functions:focal"
    ):
        train(config, loss=own_functions.margin)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("net:focal", "train(): loss is of type str: should be a function of logits and targets"),
        (lambda logits: logits.sum(1), "the function should accept logits and targets by position"),
        (lambda logits, targets, gamma: logits.sum(1), "needs the argument gamma; use functools.partial to set gamma"),
        (lambda logits, targets: logits.sum(), "loss.name = __main__:function: the function returns a scalar"),
    ],
)
def test_a_wrong_given_loss_is_one_line(tmp_path, loss, message):
    with pytest.raises(InputError) as caught:
        train(config_of(tmp_path), loss=loss)
    (line,) = caught.value.lines
    assert message in line
