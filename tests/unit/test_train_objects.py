"""`train` with a network as an object: what is trained, what is recorded, and the result."""

import json
import threading
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kit.commands import final_tensors
from kit.small_runs import FAST, Recorder, StopAfter, small_config
from loguru import logger
from torch import Tensor, nn

from distributed import build, errors, load
from distributed.build import build_data
from distributed.config import TrainConfig, load_config, read_saved
from distributed.errors import InputError
from distributed.models.network_output import check_output
from distributed.network import build_network
from distributed.recipe import train
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.capture_checks import check_captured, try_on_device

pytestmark = pytest.mark.usefixtures("restore_threads_and_log")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


class Net(nn.Module):
    """A network as a script defines it."""

    __module__ = "__main__"

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(images).relu().mean((2, 3)))
        return out


def config_of(folder: Path, **settings: Any) -> TrainConfig:
    return small_config(
        folder / "run", data={"train_samples": 48, "validation_fraction": 0.25}, **settings
    )  # 38 to train on


def test_the_result_has_network_metrics_and_history(tmp_path: Path) -> None:
    recorder = Recorder()
    result = train(config_of(tmp_path), model=Net, sinks=[recorder])
    assert (result.step, result.epoch, result.stop_reason, result.stopped_early) == (4, 2, None, False)
    assert result.best is not None
    assert [epoch.train_loss for epoch in result.history] == [epoch.train_loss for epoch in recorder.epochs]
    assert result.metrics == result.history[-1]
    assert result.metrics.test is not None
    assert recorder.epochs[-1].test is not None
    assert result.metrics.test.loss == recorder.epochs[-1].test.loss
    assert isinstance(result.network, Net)
    assert not result.network.training
    assert result.network(IMAGES).shape == (2, 10)
    again = load(tmp_path / "run", checkpoint="latest", model=Net)
    assert torch.equal(again.network(IMAGES), result.network(IMAGES))


def test_the_network_has_the_weights_of_evaluation(tmp_path: Path) -> None:
    result = train(config_of(tmp_path, optim={"ema_decay": 0.5}), model=Net)
    raw = load(tmp_path / "run", checkpoint="latest", model=Net).network
    assert torch.equal(raw.head.weight, result.network.head.weight)
    saved = final_tensors(tmp_path / "run")
    assert torch.equal(result.network.head.weight, saved["ema.head.weight"])
    assert not torch.equal(result.network.head.weight, saved["model.head.weight"])
    assert result.checkpoint == (tmp_path / "run/checkpoints/latest").resolve()


def test_a_module_is_copied_and_starts_with_its_weights(tmp_path: Path) -> None:
    net = Net(10).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = train(config_of(tmp_path, epochs=1), model=net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not net.training
    assert not torch.equal(result.network.head.weight, net.head.weight)
    with torch.no_grad():
        net.conv.weight.zero_()  # the result and later calls do not depend on it
    other = train(config_of(tmp_path / "other", epochs=1), model=net)
    assert not torch.equal(other.network.conv.weight, result.network.conv.weight)
    assert read_saved(tmp_path / "run/config.toml").model.name == "__main__:Net"


def test_an_importable_factory_is_recorded_by_its_path(tmp_path: Path) -> None:
    import kit.networks

    result = train(config_of(tmp_path, exact=FAST, epochs=1), model=kit.networks.vit_b_16)
    assert result.config.model.name == "kit.networks:vit_b_16"
    named = train(config_of(tmp_path / "named", exact=FAST, epochs=1, model={"name": "kit.networks:vit_b_16"}))
    ours, theirs = result.network.state_dict(), named.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load(tmp_path / "run").config.model.name == "kit.networks:vit_b_16"


def test_a_stopped_run_resumes_with_the_same_object(tmp_path: Path) -> None:
    whole = train(config_of(tmp_path / "whole"), model=Net)
    first = train(config_of(tmp_path), model=Net, stop=StopAfter(2))
    assert (first.stop_reason, first.step, first.epoch) == ("the test", 3, 1)
    assert [epoch.epoch for epoch in first.history] == [0]
    second = train(config_of(tmp_path), model=Net)
    assert [epoch.train_loss for epoch in second.history] == [epoch.train_loss for epoch in whole.history]
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name
    again = train(config_of(tmp_path), model=Net)  # finished: nothing is trained
    assert (again.step, len(again.history)) == (4, 2)
    assert torch.equal(again.network(IMAGES), second.network(IMAGES))


def test_stopped_in_its_first_epoch_a_run_has_no_metrics(tmp_path: Path) -> None:
    result = train(config_of(tmp_path, global_batch_size=8), stop=StopAfter(1))
    assert (result.metrics, result.history, result.epoch) == (None, [], 0)
    assert result.network is not None


def arrays(**changed: Any) -> dict[str, Any]:
    """20 training and 10 test images of 3 classes, grey, 12 x 16 pixels; None in `changed` leaves an array out."""
    draws = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for split, count in (("train", 20), ("test", 10)):
        made[f"{split}_images"] = draws.integers(256, size=(count, 12, 16), dtype=np.uint8)
        made[f"{split}_labels"] = np.arange(count) % 3
    return {name: value for name, value in (made | changed).items() if value is not None}


class Grey(nn.Module):
    __module__ = "__main__"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(12 * 16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(images.flatten(1))
        return out


def test_arrays_take_the_place_of_the_data(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", global_batch_size=8, epochs=1, data={"validation_fraction": 0.2})
    data = arrays()
    before = {name: array.copy() for name, array in data.items()}
    result = train(config, model=Grey, data=data)
    assert all((before[name] == array).all() for name, array in data.items())
    assert (result.config.data.name, result.config.data.validation_fraction) == ("__main__:data", 0.2)
    assert result.step == 3  # of 17 images, since the split is stratified
    assert result.trained.class_names == ["class 0", "class 1", "class 2"]
    images = torch.zeros(2, 1, 12, 16, dtype=torch.uint8)
    assert result.trained.predict(images).shape == (2, 3)
    assert load(tmp_path / "run", model=Grey).predict(images).shape == (2, 3)
    again = train(config.model_copy(update={"epochs": 2}), model=Grey, data=data)
    assert (again.step, len(again.history)) == (6, 2)
    other = arrays(train_labels=np.arange(20)[::-1] % 3)
    with pytest.raises(InputError, match=r"give train\(\) the arrays it started with"):
        train(config.model_copy(update={"epochs": 3}), model=Grey, data=other)
    with pytest.raises(
        InputError, match=r"this run's data exists only in the script .* train\(\.\.\., data=\.\.\.\) takes it"
    ):
        train(result.config, model=Grey)


def test_arrays_on_a_built_in_network(tmp_path: Path) -> None:
    images = np.zeros((20, 32, 32, 3), np.uint8)
    result = train(config_of(tmp_path, epochs=1), data=arrays(train_images=images, test_images=images[:10]))
    assert result.network(IMAGES).shape == (2, 3)


WRONG_DATA: dict[str, tuple[Any, list[str]]] = {
    "no dict": ([1, 2], ["train(): data is of type list: should be a dict of four NumPy arrays"]),
    "empty": ({}, ["missing in the dict given to train()"] * 4),
    "one array missing": (arrays(test_labels=None), ["test_labels: missing in the dict given to train()"]),
    "one array too many": (arrays(extra=np.zeros(3)), ["extra: not expected in the dict given to train(), only "]),
    "tensors": (
        arrays(train_labels=torch.zeros(20)),
        ["train_labels: an object of type Tensor; should be a NumPy array"],
    ),
    "floats": (
        arrays(train_images=np.zeros((20, 12, 16))),
        ["train_images: float64 [20, 12, 16]; images should be uint8"],
    ),
    "other lengths": (
        arrays(train_labels=np.zeros(7, int)),
        ["train_labels: 7 labels, but train_images has 20 images"],
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_arrays_are_one_line_each(case: str, tmp_path: Path) -> None:
    data, messages = WRONG_DATA[case]
    with pytest.raises(InputError) as caught:
        train(config_of(tmp_path), data=data)
    assert len(caught.value.lines) == len(messages)
    assert all(message in line for message, line in zip(messages, caught.value.lines, strict=True))
    assert not (tmp_path / "run/config.toml").exists()


def wrong(folder: Path, model: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        train(config_of(folder, **settings), model=model)
    [line] = caught.value.lines
    return line


class Broken(Net):
    __module__ = "__main__"

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("no\nway")


def with_lock() -> nn.Module:
    net = Net(10)
    net.lock = threading.Lock()  # type: ignore[assignment]
    return net


class NeedsImages(Net):
    """Written as in many tutorials."""

    __module__ = "__main__"

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).view(len(images), -1)


class Rotary(Net):
    __module__ = "__main__"

    def __init__(self) -> None:
        super().__init__(10)
        self.register_buffer("angles", torch.ones(3, dtype=torch.complex64))


def with_alias(*, transposed: bool) -> nn.Module:
    net = Net(10)
    net.one, net.two = nn.Linear(6, 6), nn.Linear(6, 6)
    net.two.weight = nn.Parameter(net.one.weight.t() if transposed else net.one.weight)
    return net


def with_sparse() -> nn.Module:
    net = Net(10)
    net.register_buffer("graph", torch.eye(3).to_sparse())
    return net


WRONG: dict[str, tuple[Any, str]] = {
    "needs an argument": (
        lambda num_classes, width: Net(num_classes),
        "needs the argument width; use functools.partial",
    ),
    "takes no classes": (lambda: Net(10), "the factory does not accept num_classes"),
    "returns no module": (lambda num_classes: None, "the factory returned None"),
    "raises": (lambda num_classes: 1 / 0, "the factory failed: ZeroDivisionError: division by zero ("),
    "fails on images": (Broken, "model.name = __main__:Broken: the network fails in evaluation on images of shape"),
    "other classes": (Net(7), "model.name = __main__:Net: in evaluation the network returns torch.float32 [2, 7]"),
    "frozen": (Net(10).requires_grad_(False), "the network has no parameters that require gradients"),
    "float64": (Net(10).double(), "conv.weight is torch.float64; parameters should be torch.float32"),
    "on no device": (Net(10).to("meta"), "conv.weight is on meta; leave all tensors on the CPU"),
    "cannot be copied": (with_lock(), "the network cannot be copied"),
    "complex": (Rotary(), "angles is complex, and `precision` would drop its imaginary part"),
    "an alias": (with_alias(transposed=False), "two.weight is another parameter in the memory of one.weight"),
    "a transposed alias": (with_alias(transposed=True), "two.weight is another parameter in the memory of one.weight"),
    "sparse": (with_sparse(), "graph is torch.sparse_coo, which checkpoints cannot hold"),
    "lazy": (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "1.weight has no size before the first forward pass"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_network_is_one_line(case: str, tmp_path: Path) -> None:
    model, message = WRONG[case]
    line = wrong(tmp_path, model)
    assert line.startswith("model.name = __main__:")
    assert message in line
    assert not (tmp_path / "run/config.toml").exists()


def test_a_network_of_one_size_is_refused_in_low_resolution(tmp_path: Path) -> None:
    data = {"train_samples": 48, "validation_fraction": 0.25, "augment": {"low_res_epochs": 1, "low_res_side": 24}}
    config = small_config(tmp_path / "run", data=data)
    with pytest.raises(
        InputError, match=r"images of shape \[2, 3, 24, 24\].*; raise data\.augment\.low_res_side, or remove"
    ):
        train(config, model=lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes)))
    with pytest.raises(InputError, match=r"low_res_side = 24 saves no time with model\.name = improved_alexnet"):
        train(config)
    train(config, model=Net)


def test_a_network_that_needs_images_is_refused(tmp_path: Path) -> None:
    """Of 20 test images in batches of 9, the last two leave six of eight shards empty."""
    train(config_of(tmp_path, epochs=1), model=NeedsImages)
    with pytest.raises(
        InputError, match="fails on a batch without images, and some batch has fewer images than"
    ) as caught:
        train(config_of(tmp_path / "uneven", evaluation={"batch_size": 9}), model=NeedsImages)
    assert len(caught.value.lines) == 1


class ConstantWithoutImages(Net):
    """Returns constants for a batch without images, as a user may write after that message."""

    __module__ = "__main__"

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if len(images) else images.new_zeros(0, 10)


class OtherShapeWithoutImages(Net):
    __module__ = "__main__"

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if len(images) else images.new_zeros(0, 5, requires_grad=True)


def test_wrong_logits_without_images_are_refused(tmp_path: Path) -> None:
    """A gradient is needed only if a batch of the training leaves a shard empty: here 38 images in batches of 32."""
    train(config_of(tmp_path / "evaluation", epochs=1, evaluation={"batch_size": 9}), model=ConstantWithoutImages)
    message = "the network returns [0, 10], requires_grad False; it should return logits of shape [0, 10]"
    assert message in wrong(tmp_path, ConstantWithoutImages, global_batch_size=32)
    assert "returns [0, 5]" in wrong(tmp_path, OtherShapeWithoutImages, evaluation={"batch_size": 9})


class NormalizesFeatures(Net):
    __module__ = "__main__"

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.last = nn.BatchNorm1d(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.last(super().forward(images))
        return found


def test_one_image_is_refused_where_batch_norm_would_fail(tmp_path: Path) -> None:
    """Of 38 images in batches of 37, one is left. Synchronized batch norm accepts it, also in exact mode."""
    message = wrong(tmp_path, NormalizesFeatures, global_batch_size=37, exact={"shards": 0})
    assert "Expected more than 1 value per channel" in message
    assert "some micro-batches have one image: change global_batch_size or grad_accum_steps" in message
    train(config_of(tmp_path / "exact", epochs=1, global_batch_size=37), model=NormalizesFeatures)
    train(config_of(tmp_path / "even", epochs=1, exact={"shards": 0}), model=NormalizesFeatures)


class ReturnsNothingFromTrain(Net):
    """Overrides `train` as many networks do."""

    __module__ = "__main__"

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_train_may_return_nothing(tmp_path: Path) -> None:
    assert train(config_of(tmp_path, epochs=1), model=ReturnsNothingFromTrain).epoch == 1


class Drawing(Net):
    __module__ = "__main__"

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.1, self.training)


@pytest.mark.parametrize(("model", "warnings"), [(Net, 0), (Drawing, 1)])
def test_in_fast_mode_a_network_that_draws_is_a_warning(model: type[Net], warnings: int, tmp_path: Path) -> None:
    messages: list[str] = []
    handle = logger.add(messages.append, level="WARNING")
    try:
        train(config_of(tmp_path, epochs=1, exact={"shards": 0}), model=model)
    finally:
        logger.remove(handle)
    assert sum("training draws from a global generator" in message for message in messages) == warnings


class Counting(Net):
    """Counts its batches: in an attribute, or in a buffer that it changes in place or replaces."""

    how = "attribute"

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.calls = 0
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "attribute":
            self.calls += 1
        elif self.how == "in place":
            self.batches += 1
        elif self.how == "anew":
            self.batches = self.batches + 1
        elif self.how == "data":
            self.head.weight.data = self.head.weight.data * 1
        elif self.calls == 0:
            self.calls = 1
        return super().forward(images)


class CountingInPlace(Counting):
    how = "in place"


class CountingAnew(Counting):
    how = "anew"


class Data(Counting):
    how = "data"


class CountingOnce(Counting):
    how = "once"


def test_a_buffer_that_is_replaced_is_refused(tmp_path: Path) -> None:
    """The engine would save and average the tensor that was there at the start."""
    for model, tensor in ((CountingAnew, "batches"), (Data, r"head\.weight")):
        with pytest.raises(InputError, match=f"the forward pass replaces {tensor}, so checkpoints would keep"):
            train(config_of(tmp_path, exact=FAST), model=model)
    result = train(config_of(tmp_path, exact=FAST, epochs=1), model=CountingInPlace)
    assert result.network.batches > 0


def test_a_captured_network_needs_no_python() -> None:
    images = torch.rand(3, 3, 12, 12)
    normed = Net(10)
    torch.nn.utils.spectral_norm(normed.head)
    for network in (CountingInPlace(10), CountingOnce(10), normed):
        check_captured(network, images, "net:make", replaced=[], draws_on_host=False)
    with pytest.raises(InputError, match="changes calls"):
        check_captured(CountingOnce(10), images, "net:make", replaced=[], draws_on_host=False, one_size=False)
    with pytest.raises(InputError, match="changes calls, but a replayed CUDA graph runs no Python"):
        check_captured(Counting(10), images, "net:make", replaced=[], draws_on_host=False)
    with pytest.raises(InputError, match="draws random numbers on the CPU, which a replayed CUDA graph would not"):
        check_captured(Net(10), images, "net:make", replaced=[], draws_on_host=True)


class Masked(Net):
    """With a constant that is no buffer, so it stays on the CPU."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.mask = torch.ones(10)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.mask


def test_a_network_that_fails_on_another_device_is_one_line() -> None:
    """The meta device stands for a GPU."""
    images, keys = torch.rand(2, 3, 12, 12, device="meta"), torch.zeros(2, 2, dtype=torch.int64)
    check = partial(check_output, name="net:make", num_classes=10, seed=0)
    check(Net(10), images, keys)
    with pytest.raises(InputError, match=r"fails in evaluation on images of shape \[2, 3, 12, 12\] on meta: "):
        check(Masked(10), images, keys)


class Closing(Net):
    """With a function that refers to the network itself, also in a copy."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.scale = nn.Parameter(torch.ones(1))
        self.scaled = lambda x: x * self.scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scaled(super().forward(images)) + torch.rand(1).item()


def test_a_network_is_back_on_the_cpu_after_its_trial(tmp_path: Path) -> None:
    model, images, keys = Closing(10), torch.rand(2, 3, 12, 12), torch.zeros(2, 2, dtype=torch.int64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check = partial(check_output, model, name="net:make", num_classes=10, seed=0)
    assert try_on_device(check, model, images, keys, config_of(tmp_path), torch.device("meta"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_is_tried_in_the_precision_of_the_training() -> None:
    class Half(Net):
        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images)
            assert out.dtype == torch.bfloat16
            return out

    images, keys = torch.rand(2, 3, 12, 12), torch.zeros(2, 2, dtype=torch.int64)
    check_output(Half(10), images, keys, name="net:make", num_classes=10, seed=0, low=torch.bfloat16)


def test_a_full_gpu_is_not_the_networks_fault() -> None:
    class Full(Net):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    images, keys = torch.rand(2, 3, 12, 12), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(torch.OutOfMemoryError):
        check_output(Full(10), images, keys, name="net:make", num_classes=10, seed=0)


class Scaled(Net):
    """With a trainable tensor that is no nn.Parameter."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.scale = torch.ones(1, requires_grad=True)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


def test_a_trainable_tensor_that_is_no_parameter_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a tensor of shape \[1\] requires a gradient, but is no parameter"):
        train(config_of(tmp_path, exact={"shards": 2}), model=Scaled)


def test_a_path_is_not_an_object(tmp_path: Path) -> None:
    message = "train(): model = own:Net: should be a function or class called as model(num_classes=N)"
    assert wrong(tmp_path, "own:Net").startswith(message)
    assert not (tmp_path / "run").exists()


def test_another_object_does_not_resume_the_run(tmp_path: Path) -> None:
    train(config_of(tmp_path, epochs=1), model=Net)
    with pytest.raises(InputError, match=r"model\.name = __main__:Other: this run was started with __main__:Net"):
        train(config_of(tmp_path), model=type("Other", (Net,), {}))
    with pytest.raises(InputError, match=r"model\.name = improved_alexnet: this run was started with __main__:Net"):
        train(config_of(tmp_path))
    with pytest.raises(InputError, match=r"conv\.weight"):
        train(config_of(tmp_path), model=Net(10, width=5))
    assert RunFolder(tmp_path / "run").status().status == "finished", "what was refused changed nothing"


def test_bad_data_are_reported_by_the_first_rank_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait, so that torchrun does not end it first."""

    def fail(_: object) -> None:
        raise InputError("a broken image")

    waited: list[float] = []
    monkeypatch.setattr(build.registry, "fetch_missing", fail)
    monkeypatch.setattr(errors, "time", SimpleNamespace(sleep=waited.append))
    for rank, expected in enumerate(([], [3])):
        with pytest.raises(InputError, match="a broken image"):
            build_data(config_of(tmp_path), Topology(rank, 2, rank, 2), torch.device("cpu"))
        assert waited == expected


def test_an_engine_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    config = config_of(tmp_path, engine={"name": "deepspeed"})
    data = build_data(config, Topology(), torch.device("cpu"))
    with pytest.raises(InputError, match=r"engine\.name = deepspeed needs the package deepspeed: pip install"):
        build_network(config, Topology(world_size=2), data)


@pytest.mark.parametrize("engine", [{"name": "fsdp"}, {"name": "deepspeed", "zero_stage": 1}])
def test_experts_need_all_gradients_on_every_rank(tmp_path: Path, engine: dict[str, Any]) -> None:
    config = config_of(tmp_path, engine=engine, exact=FAST, model={"name": "kit.experts:Experts"})
    data = build_data(config, Topology(), torch.device("cpu"))
    with pytest.raises(InputError, match=r"but experts\.\d\.0 is used by some images only: set engine\.name = ddp"):
        build_network(config, Topology(world_size=2), data)


@pytest.mark.parametrize(("exact", "ranks"), [({"shards": 4}, 1), (FAST, 2)])
def test_experts_cannot_have_batch_norm(tmp_path: Path, exact: dict[str, Any], ranks: int) -> None:
    """A shard without an expert's images would not take part in its statistics, and the others would wait."""
    model = {"name": "kit.experts:Experts", "options": {"normed": True}}
    config = config_of(tmp_path, exact=exact, model=model)
    data = build_data(config, Topology(), torch.device("cpu"))
    with pytest.raises(InputError, match=r"experts\.\d\.1 is a batch norm that only some images use"):
        build_network(config, Topology(world_size=ranks), data)


@pytest.mark.parametrize("exact", [{"shards": 4}, FAST])
def test_a_backward_pass_that_fails_is_one_line(tmp_path: Path, exact: dict[str, Any]) -> None:
    class InPlace(Net):
        def forward(self, images: Tensor) -> Tensor:
            x = super().forward(images).exp()
            return x.add_(1) if self.training else x

    config = config_of(tmp_path, exact=exact, model={"name": "__main__:InPlace"})
    data = build_data(config, Topology(), torch.device("cpu"))
    with pytest.raises(InputError, match="the backward pass fails: RuntimeError: one of the variables needed"):
        build_network(config, Topology(), data, InPlace(10))


def test_load_needs_the_object_and_only_then_takes_it(tmp_path: Path) -> None:
    result = train(config_of(tmp_path, epochs=1), model=Net(10))
    with pytest.raises(
        InputError, match=r"exists only in the script .*distributed\.load\(RUN, model=\.\.\.\) takes it"
    ):
        load(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run", model=Net).network(IMAGES), result.network(IMAGES))
    with pytest.raises(InputError, match=r"does not fit the run's config\.toml"):
        load(tmp_path / "run", model=Net(10, width=5))
    with pytest.raises(InputError, match=r"load\(\): model is of type int"):
        load(tmp_path / "run", model=3)  # type: ignore[arg-type]
    train(config_of(tmp_path / "built_in", epochs=1))
    with pytest.raises(InputError, match=r"load\(\): model was given, but the run has model\.name = improved_alexnet"):
        load(tmp_path / "built_in/run", model=Net)


def test_the_network_of_a_deleted_run_is_missing(tmp_path: Path) -> None:
    import shutil

    result = train(config_of(tmp_path, epochs=1), model=Net)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(InputError, match="run/checkpoints/step-"):
        _ = result.network


def test_torch_keeps_the_settings_of_the_program(tmp_path: Path) -> None:
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark, torch.get_rng_state().tolist()
    torch.set_num_threads(2)
    try:
        train(config_of(tmp_path, epochs=1, threads=1), model=Net)
        assert torch.get_num_threads() == 2
        with pytest.raises(InputError):
            train(config_of(tmp_path / "fails", threads=1), model=Broken)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
    assert (cudnn.deterministic, cudnn.benchmark, torch.get_rng_state().tolist()) == before[1:]


def test_a_saved_config_trains_again(tmp_path: Path) -> None:
    train(config_of(tmp_path, epochs=1), model=Net)
    saved = load_config(tmp_path / "run/config.toml", run_dir=str(tmp_path / "again"))
    with pytest.raises(InputError, match="exists only in the script"):
        train(saved)
    assert train(saved, model=Net).step == 2
    status = json.loads((tmp_path / "again/status.json").read_text())
    assert status["status"] == "finished"
