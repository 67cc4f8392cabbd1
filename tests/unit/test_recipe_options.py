"""Options of a run: initial weights, restoring the best epoch, losses, a profile, compiled kernels."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from kit.small_runs import StopAfter
from loguru import logger
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from distributed.build import build_data, build_engine
from distributed.checkpoint.warm_start import evaluation_weights
from distributed.config import TrainConfig, from_command_line
from distributed.config.functions import Loss
from distributed.engine.protocol import Engine
from distributed.errors import InputError
from distributed.network import build_initial_network
from distributed.recipe import train
from distributed.run.checkpoint_layout import checkpoints
from distributed.run.folder import RunFolder
from distributed.run.resume_checks import check_init_from
from distributed.topology import Topology
from distributed.train import checked_config
from distributed.training.losses import CROSS_ENTROPY, build_losses
from distributed.training.steps import _shard_loss, evaluate
from distributed.training.views import Views

CPU = torch.device("cpu")
OPTIONS = (
    "--data.name generated10 --data.train_samples 40 --data.test_samples 10 --global_batch_size 16 --epochs 2 "
    "--precision float32 --device cpu --threads 1 --logging.every_steps 1 --logging.tensorboard false --logging.curves false "
    "--logging.level WARNING --optim.lr 0.05 --schedule.name constant --data.validation_fraction 0"
)
SMALL = OPTIONS.split()


pytestmark = pytest.mark.usefixtures("restore_threads_and_log")


def arguments_of(run_dir: Path, *arguments: str) -> list[str]:
    replaced = {argument for argument in arguments if argument.startswith("--")}
    kept = [w for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in replaced for w in pair]
    return [*kept, *arguments, "--run_dir", str(run_dir)]


def config_of(run_dir: Path, *arguments: str) -> TrainConfig:
    return from_command_line(arguments_of(run_dir, *arguments)).config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with EMA."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(config_of(run_dir, "--optim.ema_decay", "0.8"))
    return run_dir


def tensors_of(run_dir: Path, index: int = -1) -> dict[str, Tensor]:
    return load_file(checkpoints(RunFolder(run_dir).checkpoints)[index] / "tensors.safetensors")


def fresh_engine(tmp_path: Path, *arguments: str) -> Engine:
    config, topology = config_of(tmp_path / "fresh", *arguments), Topology()
    data = build_data(config, topology, CPU)
    return build_engine(config, topology, data, CPU, build_initial_network(config, topology, data))


# Weights of another run


def test_a_run_starts_from_anothers_evaluation_weights(trained, tmp_path):
    engine = fresh_engine(tmp_path, "--optim.ema_decay", "0.5", "--init_from", str(trained))
    expected, found = tensors_of(trained), dict(engine.state())
    assert torch.equal(found["model.fc1.weight"], expected["ema.fc1.weight"])
    assert torch.equal(found["model.conv.1.running_mean"], expected["ema.conv.1.running_mean"])
    assert torch.equal(found["ema.fc1.weight"], expected["ema.fc1.weight"])
    assert not found["optimizer.fc1.weight.momentum_buffer"].any()
    assert not torch.equal(expected["ema.fc1.weight"], expected["model.fc1.weight"])


def test_a_last_layer_of_other_classes_is_not_loaded(trained, tmp_path):
    before = dict(fresh_engine(tmp_path, "--data.name", "generated100").state())
    found = dict(fresh_engine(tmp_path, "--data.name", "generated100", "--init_from", str(trained)).state())
    assert torch.equal(found["model.fc3.weight"], before["model.fc3.weight"])
    assert torch.equal(found["model.fc3.bias"], before["model.fc3.bias"])
    assert torch.equal(
        found["model.fc2.weight"], evaluation_weights(checkpoints(trained / "checkpoints")[-1])["fc2.weight"]
    )


def test_a_run_that_has_saved_needs_no_init_from(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other, symlinks=True)
    config = config_of(tmp_path / "run", "--init_from", str(other), "--epochs", "1")
    check_init_from(config)
    train(config)
    shutil.rmtree(other)
    again = arguments_of(tmp_path / "run", "--init_from", str(other), "--epochs", "2")
    assert train(checked_config(again, Topology()).config).epoch == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init_from", "nowhere"], r"init_from = nowhere: no checkpoint there"),
        (
            ["--init_from", "RUN", "--model.name", "cifar_alexnet"],
            r"holds weights of improved_alexnet, but model\.name",
        ),
        (["--init_from", "RUN/checkpoints"], r"no checkpoint there"),
    ],
)
def test_an_unusable_init_from_is_refused_before_training(trained, tmp_path, arguments, message):
    arguments = [word.replace("RUN", str(trained)) for word in arguments]
    with pytest.raises(InputError, match=message):
        check_init_from(config_of(tmp_path / "run", *arguments))


def test_a_damaged_init_from_is_refused(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy, symlinks=True)
    tensors = checkpoints(copy / "checkpoints")[-1] / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged: tensors\.safetensors"):
        fresh_engine(tmp_path, "--init_from", str(copy))


# Restoring the best weights at a drop


def test_a_drop_restores_the_best_weights_and_zeroes_momentum(tmp_path):
    log: list[str] = []
    logger.add(lambda message: log.append(message.record["message"]))
    config = config_of(
        tmp_path / "run", "--epochs", "6", "--data.validation_fraction", "0.5", "--schedule.name", "plateau",
        "--schedule.metric", "loss", "--checkpoint.best_by", "loss", "--schedule.patience", "0",
        "--schedule.restore_best_on_drop",
        "--checkpoint.keep_last", "10", "--optim.lr", "0.3", "--exact.shards", "2", "--checkpoint.max_overhead", "1",
    )  # fmt: skip
    train(config)
    returns = [int(match[1]) for line in log if (match := re.search(r"buffers of epoch (\d+) and reset", line))]
    drops = [index for index, line in enumerate(log) if "(drop" in line]
    assert len(returns) == len(drops) > 0
    epochs = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics_file.read_text().splitlines()]
    losses = [line["validation"]["loss"] for line in epochs if line["kind"] == "epoch"]
    rates = [line["lr"] for line in epochs if line["kind"] == "train"]
    after_drop = [e + 1 for e in range(5) if rates[2 * e + 2] < rates[2 * e]]
    for epoch, best in zip(after_drop, returns, strict=False):
        assert best - 1 == min(range(epoch), key=losses.__getitem__)
        there, here = tensors_of(tmp_path / "run", best - 1), tensors_of(tmp_path / "run", epoch - 1)
        for name, tensor in here.items():
            assert not tensor.any() if name.startswith("optimizer.") else torch.equal(tensor, there[name]), name


def test_restore_best_needs_best_by_of_the_same_metric(tmp_path):
    arguments = ("--schedule.name", "plateau", "--schedule.metric", "loss", "--schedule.restore_best_on_drop")
    with pytest.raises(InputError, match=r"set checkpoint\.best_by = loss"):
        config_of(tmp_path, *arguments, "--data.validation_fraction", "0.5")


# Losses and evaluation


def test_label_smoothing_and_mixing_follow_the_papers(tmp_path):
    config = config_of(tmp_path, "--data.augment.mixup", "0.5")
    data = build_data(config, Topology(), CPU)
    (batch,) = next(data.train_epoch(0))
    logits = torch.randn(len(batch.labels), 10)
    value, outcome = _shard_loss(build_losses(Loss(label_smoothing=0.2)).training, lambda images: logits, batch)
    assert batch.mixed is not None
    weight = batch.mixed.own_weight[:, None]
    targets = weight * F.one_hot(batch.labels, 10) + (1 - weight) * F.one_hot(batch.mixed.labels, 10)
    expected = -((0.8 * targets + 0.02) * logits.log_softmax(1)).sum(1)
    assert torch.allclose(outcome.losses, expected, atol=1e-5)
    assert float(value) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_mixing_accepts_logits_of_another_type(tmp_path):
    data = build_data(config_of(tmp_path, "--data.augment.mixup", "0.5"), Topology(), CPU)
    (batch,) = next(data.train_epoch(0))
    logits = torch.randn(len(batch.labels), 10, dtype=torch.float64)
    _, outcome = _shard_loss(build_losses(Loss()).training, lambda images: logits, batch)
    assert outcome.losses.dtype == torch.float64


def test_an_image_is_mixed_with_the_augmented_previous_one(tmp_path):
    plain = build_data(config_of(tmp_path), Topology(), CPU)
    mixing = build_data(config_of(tmp_path, "--data.augment.cutmix", "1"), Topology(), CPU)
    (alone,), (mixed,) = next(plain.train_epoch(3)), next(mixing.train_epoch(3))
    assert torch.equal(mixed.labels, alone.labels)
    assert torch.equal(mixed.mixed.labels, alone.labels.roll(1))
    own, partner = mixed.images == alone.images, mixed.images == alone.images.roll(1, 0)
    assert bool((own | partner).all())
    assert not bool(own.all())
    shards = mixed.shards()
    assert torch.equal(torch.cat([shard.mixed.own_weight for shard in shards]), mixed.mixed.own_weight)
    assert torch.equal(torch.cat([shard.mixed.labels for shard in shards]), mixed.mixed.labels)


def test_mixing_works_in_fast_mode(tmp_path):
    assert train(config_of(tmp_path / "run", "--data.augment.mixup", "0.5", "--exact.shards", "0")).epoch == 2


def test_flip_tta_averages_the_logits_of_image_and_flip(tmp_path):
    config = config_of(tmp_path)
    data = build_data(config, Topology(), CPU)
    engine = build_engine(config, Topology(), data, CPU)
    (batch,) = data.evaluation("test")
    with engine.evaluating():
        plain = engine.predict(batch)
        mirrored = engine.model(batch.images.flip(3)).detach()
    expected = F.cross_entropy((plain + mirrored) / 2, batch.labels)
    found = evaluate(engine, data, "test", loss=CROSS_ENTROPY, views=Views(flip=True), device=CPU)
    assert found.mean_loss == pytest.approx(float(expected), rel=1e-5)
    assert found.mean_loss != evaluate(engine, data, "test", loss=CROSS_ENTROPY, views=Views(), device=CPU).mean_loss


# A profile, compiled kernels


def test_a_profile_is_written_to_the_run_folder(tmp_path):
    config = config_of(tmp_path / "run", "--epochs", "5", "--logging.profile_steps", "3")
    train(config)
    folder = RunFolder(tmp_path / "run").profile
    assert "aten::" in (folder / "table.txt").read_text()
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::cross_entropy_loss" for event in events) >= 3


def test_a_short_attempt_still_writes_its_profile(tmp_path):
    train(config_of(tmp_path / "run", "--epochs", "4", "--logging.profile_steps", "1000"))
    folder = RunFolder(tmp_path / "run")
    assert (folder.profile / "table.txt").is_file()
    assert "profile of 2 steps in" in (folder.logs / "rank-0000.log").read_text()


@pytest.mark.parametrize("steps", [4, 10])
def test_an_attempt_too_short_for_a_profile_says_so(steps, tmp_path):
    """The first ten steps are not profiled."""
    stop = StopAfter(steps - 1)
    train(config_of(tmp_path / "run", "--epochs", "9", "--logging.profile_steps", "3"), stop=stop)
    log = (RunFolder(tmp_path / "run").logs / "rank-0000.log").read_text()
    assert log.count(f"no profile; the attempt took only {steps} steps, and the first 10 are not profiled") == 1
    assert "ui.perfetto.dev" not in log


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_compiled_run_has_the_same_losses(tmp_path):
    losses = []
    for arguments in (["--exact.shards", "0"], ["--compile"]):
        run_dir = tmp_path / arguments[0]
        train(config_of(run_dir, *arguments, "--precision", "float64", "--epochs", "1"))
        lines = [json.loads(line) for line in RunFolder(run_dir).metrics_file.read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(losses[0]) == 3


def test_compile_is_refused_in_exact_mode(tmp_path):
    with pytest.raises(InputError, match=r"set exact\.shards = 0"):
        config_of(tmp_path, "--compile", "--exact.shards", "4")
    assert config_of(tmp_path, "--compile").shards_on("cpu") == 0
