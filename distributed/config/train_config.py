"""The tree of settings: frozen, unknown keys forbidden at every level. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from distributed.config.data import AnyData, CifarData
from distributed.config.engines import AnyEngine, Ddp
from distributed.config.schedules import Constant, Cosine, EarlyStopping, OneCycle, Plateau
from distributed.config.schema import AnyPath, OptionalPath, Section, operational, setting
from distributed.config.sections import (
    AdamW,
    Checkpoint,
    Evaluation,
    Exact,
    Logging,
    Loss,
    Model,
    Scaling,
    Sgd,
)  # fmt: skip
from distributed.errors import InputError

DataSection = Annotated[AnyData, Field(discriminator="name")]
EngineSection = Annotated[AnyEngine, Field(discriminator="name")]
OptimSection = Annotated[Sgd | AdamW, Field(discriminator="name")]
ScheduleSection = Annotated[Constant | Cosine | OneCycle | Plateau, Field(discriminator="name")]


class TrainConfig(Section):
    """Everything that defines a run. The curve depends on `global_batch_size` and `grad_accum_steps`, not on the ranks."""

    run_dir: AnyPath = operational(
        Path("runs/default"), "folder of the run; runs/<config name or model-data> if not given"
    )
    seed: int = setting(0, "key of initial weights, order, augmentation and dropout", ge=0, lt=2**63)
    epochs: int = setting(10, "passes over the training images", gt=0)
    global_batch_size: int = setting(128, "images a step, over all ranks and micro-batches", gt=0)
    grad_accum_steps: int = setting(1, "micro-batches a step; batch norm sees one of them at a time", gt=0)
    precision: Literal["float32", "tf32", "bfloat16", "float16", "float64"] = setting(
        "bfloat16", "of the forward and backward pass; weights and batch norm's statistics stay float32 with bfloat16 and "
        "float16 (autocast); float16's loss is scaled, and steps where a gradient overflows are skipped; tf32: float32 "
        "with inputs of products rounded to 10 bits of mantissa, on CUDA"
    )  # fmt: skip
    channels_last: bool = setting(True, "NHWC memory layout of images and convolutions")
    device: Literal["auto", "cpu", "cuda"] = operational("auto", "auto: CUDA where there is one")
    threads: int = operational(
        0, "CPU threads a rank; 0: the available CPUs of the machine divided among its ranks", ge=0, le=4096
    )
    timeout_seconds: float = operational(600.0, "wait for a silent rank before the run fails", gt=0, le=1e7)
    data: DataSection = setting(CifarData(), "the images")
    model: Model = setting(Model(), "the network")
    init_from: OptionalPath = setting(
        None, "run folder or checkpoint whose weights to start from; a last layer of other classes starts afresh"
    )
    cuda_graphs: bool = operational(
        True, "on one GPU, replay training steps as CUDA graphs: same bits, several times faster at small batches"
    )
    compile: bool = setting(False, "torch.compile the model; in fast mode only")
    loss: Loss = setting(Loss(), "what is minimized: cross-entropy")
    optim: OptimSection = setting(Sgd(), "the optimizer")
    schedule: ScheduleSection = setting(OneCycle(), "the learning rate over time")
    early_stopping: EarlyStopping | None = setting(None, "end the run when validation stops improving; none: never")
    engine: EngineSection = setting(Ddp(), "how the model is spread over the ranks")
    exact: Exact = setting(Exact(), "the same bits at any number of processes")
    evaluation: Evaluation = setting(Evaluation(), "measuring on the validation and test splits")
    checkpoint: Checkpoint = setting(Checkpoint(), "when to save and what to keep")
    logging: Logging = setting(Logging(), "lines, curves")
    scaling: Scaling | None = operational(None, "workers on a Ray cluster; for launch.ray_train only")

    def shards_on(self, device_type: str) -> int:
        """`exact.shards` with auto resolved for `cpu` or `cuda`; 0: exact mode is off."""
        if self.exact.shards != "auto":
            return self.exact.shards
        if device_type != "cpu" or self.compile or self.engine.name == "deepspeed" or self.compression:
            return 0
        return 1 << min(8, self.global_batch_size // self.grad_accum_steps).bit_length() - 1

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
    def compression(self) -> Literal["bfloat16"] | None:
        """How gradients are compressed; None if they are not, or under an engine that cannot."""
        return self.engine.compression if isinstance(self.engine, Ddp) else None

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
    found = _device_conflicts(config) + config.data.conflicts()
    found += config.engine.conflicts(config.exact.shards, config.precision)
    optim, schedule, shards = config.optim, config.schedule, config.exact.shards
    micro_batch = config.global_batch_size // config.grad_accum_steps
    if isinstance(shards, int) and shards > max(1, micro_batch):
        found.append(
            f"exact.shards = {shards} is more than the {micro_batch} images of a micro-batch: lower it, or raise "
            "global_batch_size"
        )
    if config.grad_accum_steps > config.global_batch_size:
        found.append(
            f"grad_accum_steps = {config.grad_accum_steps} is more than global_batch_size = {config.global_batch_size}: "
            "a micro-batch needs at least one image; lower grad_accum_steps"
        )
    if config.compile and shards not in ("auto", 0):
        found.append(
            f"compile = true cannot go with exact.shards = {shards}: a compiled graph cannot rest where shards meet; "
            "set exact.shards = 0, or compile = false"
        )
    if config.compile and config.engine.name != "ddp":
        found.append(
            f"compile = true cannot go with engine.name = {config.engine.name}: set engine.name = ddp, or leave it out"
        )
    if isinstance(schedule, Plateau) and schedule.restore_best_on_drop and config.best_by != schedule.metric:
        found.append(
            f"schedule.restore_best_on_drop needs the best epoch by {schedule.metric}, and checkpoint.best_by = "
            f"{config.checkpoint.best_by}: set checkpoint.best_by = {schedule.metric}"
        )
    if isinstance(optim, Sgd) and optim.nesterov and not optim.momentum:
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


def _device_conflicts(config: TrainConfig) -> list[str]:
    found = config.scaling.conflicts(config.device) if config.scaling else []
    if config.precision == "tf32" and config.device == "cpu":
        found.append("precision = tf32 needs CUDA, but device = cpu: set precision = float32, or device = cuda")
    return found
