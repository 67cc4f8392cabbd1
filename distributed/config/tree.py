"""The tree of settings: frozen, unknown keys forbidden at every level. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from distributed.config.schedules import Constant, Cosine, EarlyStopping, OneCycle, Plateau
from distributed.config.section import AnyPath, Section, operational, setting
from distributed.errors import InputError


class Augment(Section):
    crop: int = setting(
        4, "zero padding in pixels around the image before a random crop back to its size; 0: none", ge=0, le=16
    )
    flip: bool = setting(True, "mirror each training image with probability one half")
    cutout: int = setting(0, "side in pixels of the square set to the mean at a random place; 0: none", ge=0, le=32)


class _Data(Section):
    validation_fraction: float = setting(
        0.2, "part of the training images held out by a fixed stratified shuffle; 0: none, train on all", ge=0, le=0.9
    )
    split_seed: int = setting(0, "key of that shuffle; apart from `seed`, so that runs with other seeds share it", ge=0)
    augment: Augment = setting(Augment(), "random changes of the training images")

    @property
    def num_classes(self) -> int:
        return 100 if getattr(self, "name", "").endswith("100") else 10


class CifarData(_Data):
    name: Literal["cifar10", "cifar100"] = setting("cifar10", "the data set")
    root: AnyPath = operational(
        Path("data"), "folder with cifar-10-batches-bin/ or cifar-100-binary/ (official binary layout)"
    )


class GeneratedData(_Data):
    name: Literal["generated10", "generated100"] = setting("generated10", "procedural images in CIFAR's place")
    train_samples: int = setting(50_000, "number of training images, validation included", ge=10, le=1_000_000)
    test_samples: int = setting(10_000, "number of test images", ge=10, le=1_000_000)


class Model(Section):
    name: Literal["improved_alexnet"] = setting("improved_alexnet", "the network")
    dropout: float = setting(0.5, "probability that a unit of a hidden linear layer is dropped", ge=0, lt=1)


class Sgd(Section):
    name: Literal["sgd"] = setting("sgd", "the optimizer")
    lr: float = setting(0.1, "learning rate at `lr_base_batch`, or as it is without scaling", gt=0, le=100)
    lr_scaling: Literal["none", "linear", "sqrt"] = setting(
        "none", "how lr grows with global_batch_size / lr_base_batch"
    )
    lr_base_batch: int | None = setting(None, "global batch at which lr holds; only with lr_scaling", gt=0)
    momentum: float = setting(0.9, "momentum", ge=0, lt=1)
    nesterov: bool = setting(True, "Nesterov's form of momentum")
    weight_decay: float = setting(5e-4, "L2 penalty", ge=0, le=1)
    decay_norm_and_bias: bool = setting(False, "apply weight_decay to biases and batch norm's weights too")
    clip_norm: float | None = setting(None, "scale the gradient down to this L2 norm where it is larger", gt=0)


class Ddp(Section):
    name: Literal["ddp"] = setting("ddp", "replicated weights, gradients summed over ranks (DistributedDataParallel)")
    bucket_mib: int = setting(25, "size of a bucket of gradients that is exchanged at once, MiB", gt=0, le=1024)


def _shard_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 0 and not value & (value - 1)):
        return value
    raise PydanticCustomError("shards", "should be a power of two, as 8, or 0 for fast mode, or auto")


class Exact(Section):
    shards: Annotated[int | Literal["auto"], PlainValidator(_shard_count)] = setting(
        "auto",
        "parts of each micro-batch, a power of two: the same bits on any number of processes up to this; 0: off; "
        "auto: on CPU the largest power of two up to 8 that the batch allows, on CUDA 0",
    )


class Evaluation(Section):
    batch_size: int = setting(1000, "images a forward pass, over all ranks", gt=0)
    test_every_epoch: bool = operational(True, "evaluate the test split each epoch, for its curve; it never steers")


class Checkpoint(Section):
    every_steps: int = operational(0, "save every N steps besides each epoch; 0: off", ge=0)
    every_minutes: float = operational(5.0, "save every N minutes besides each epoch; 0: off", ge=0)
    keep_last: int = operational(2, "newest checkpoints that are kept", ge=1)
    best_by: Literal["auto", "accuracy", "loss", "none"] = setting(
        "auto", "validation metric whose best epoch is kept too; auto: accuracy where there is a validation split"
    )

    def is_due(self, step: int) -> bool:
        """Whether `every_steps` asks for a save after this many steps."""
        return bool(self.every_steps) and step % self.every_steps == 0


class Logging(Section):
    every_steps: int = operational(50, "steps between lines of training metrics", gt=0)
    level: Literal["DEBUG", "INFO", "WARNING"] = operational("INFO", "least level shown on the terminal")
    tensorboard: bool = operational(True, "write TensorBoard event files beside metrics.jsonl")


DataSection = Annotated[CifarData | GeneratedData, Field(discriminator="name")]
ScheduleSection = Annotated[Constant | Cosine | OneCycle | Plateau, Field(discriminator="name")]


class TrainConfig(Section):
    """Everything that defines a run. The curve depends on `global_batch_size` and `accumulation`, not on the ranks."""

    run_dir: AnyPath = operational(
        Path("runs/default"), "folder of the run; runs/<config name or model-data> if not given"
    )
    seed: int = setting(0, "key of initial weights, order, augmentation and dropout", ge=0, lt=2**63)
    epochs: int = setting(10, "passes over the training images", gt=0)
    global_batch_size: int = setting(128, "images a step, over all ranks and micro-batches", gt=0)
    accumulation: int = setting(1, "micro-batches a step; batch norm sees one of them at a time", gt=0)
    precision: Literal["float32", "bfloat16", "float64"] = setting(
        "bfloat16", "of the forward and backward pass; weights stay float32 with bfloat16 (autocast)"
    )
    channels_last: bool = setting(True, "NHWC memory layout of images and convolutions")
    device: Literal["auto", "cpu", "cuda"] = operational("auto", "auto: CUDA where there is one")
    threads: int = operational(0, "CPU threads a rank; 0: the cores of the machine shared among its ranks", ge=0)
    timeout_seconds: float = operational(600.0, "wait for a silent rank before the run fails", gt=0)
    data: DataSection = setting(CifarData(), "the images")
    model: Model = setting(Model(), "the network")
    optim: Sgd = setting(Sgd(), "the optimizer")
    schedule: ScheduleSection = setting(OneCycle(), "the learning rate over time")
    early_stopping: EarlyStopping | None = setting(None, "end the run when validation stops improving; none: never")
    engine: Ddp = setting(Ddp(), "how the model is spread over the ranks")
    exact: Exact = setting(Exact(), "the same bits at any number of processes")
    evaluation: Evaluation = setting(Evaluation(), "measuring on the validation and test splits")
    checkpoint: Checkpoint = setting(Checkpoint(), "when to save and what to keep")
    logging: Logging = setting(Logging(), "lines, curves")

    def shards_on(self, device_type: str) -> int:
        """`exact.shards` with auto resolved for `cpu` or `cuda`; 0: exact mode is off."""
        if self.exact.shards != "auto":
            return self.exact.shards
        if device_type != "cpu":
            return 0
        return 1 << min(8, self.global_batch_size // self.accumulation).bit_length() - 1

    def check_world_size(self, world_size: int, device_type: str) -> None:
        """Raises InputError where there are more processes than shards."""
        shards = self.shards_on(device_type)
        if shards and world_size > shards:
            enough = 1 << (world_size - 1).bit_length()
            raise InputError(
                f"exact.shards = {shards}{' (auto)' if self.exact.shards == 'auto' else ''} is less than the {world_size} "
                f"processes: start at most {shards}; or begin another run with exact.shards = {enough}, or with 0, fast mode"
            )

    @property
    def best_by(self) -> Literal["accuracy", "loss"] | None:
        """The validation metric that marks the best checkpoint, `auto` resolved."""
        if self.checkpoint.best_by == "auto":
            return "accuracy" if self.data.validation_fraction else None
        return None if self.checkpoint.best_by == "none" else self.checkpoint.best_by

    @property
    def peak_lr(self) -> float:
        """`optim.lr` scaled to the global batch (linear: Goyal et al. 2017, arXiv 1706.02677)."""
        optim = self.optim
        ratio: float = self.global_batch_size / (optim.lr_base_batch or self.global_batch_size)
        return optim.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_scaling]

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if conflicts := _conflicts(self):
            raise PydanticCustomError("conflict", "{lines}", {"lines": "\n".join(conflicts)})
        return self


def _conflicts(config: TrainConfig) -> list[str]:
    """Settings that are each valid but cannot stand together, a line each: what, and the remedy."""
    found = []
    optim, schedule, shards = config.optim, config.schedule, config.exact.shards
    micro_batch = config.global_batch_size // config.accumulation
    if isinstance(shards, int) and shards > max(1, micro_batch):
        found.append(
            f"exact.shards = {shards} is more than the {micro_batch} images of a micro-batch: lower it, or raise "
            "global_batch_size"
        )
    if config.accumulation > config.global_batch_size:
        found.append(
            f"accumulation = {config.accumulation} is more than global_batch_size = {config.global_batch_size}: "
            "a micro-batch needs at least one image; lower accumulation"
        )
    if optim.nesterov and not optim.momentum:
        found.append("optim.nesterov = true needs momentum: set optim.momentum above 0 or optim.nesterov = false")
    if optim.lr_scaling == "none" and optim.lr_base_batch is not None:
        found.append(
            f"optim.lr_base_batch = {optim.lr_base_batch} has no effect with optim.lr_scaling = none: "
            "remove it or set optim.lr_scaling to linear or sqrt"
        )
    if optim.lr_scaling != "none" and optim.lr_base_batch is None:
        found.append(
            f"optim.lr_scaling = {optim.lr_scaling} needs optim.lr_base_batch: the batch at which optim.lr holds"
        )
    if isinstance(schedule, Constant | Cosine) and schedule.warmup_epochs >= config.epochs:
        found.append(
            f"schedule.warmup_epochs = {schedule.warmup_epochs} leaves nothing of epochs = {config.epochs}: lower it"
        )
    if not config.data.validation_fraction:
        remedy = "set data.validation_fraction above 0"
        if isinstance(schedule, Plateau):
            found.append(
                f"schedule.name = plateau watches validation, and there is none: {remedy} or choose another schedule"
            )
        if config.early_stopping:
            found.append(f"early_stopping watches validation, and there is none: {remedy} or leave early_stopping out")
        if config.checkpoint.best_by in ("accuracy", "loss"):
            found.append(
                f"checkpoint.best_by = {config.checkpoint.best_by} needs validation, and there is none: {remedy} "
                "or set checkpoint.best_by = none"
            )
    return found
