"""The tree of settings: frozen, with unknown keys forbidden at every level. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from distributed.config.data import CifarData, DataSection, ImageFolderData, ImportedData
from distributed.config.engines import AnyEngine, Ddp, compile_conflicts
from distributed.config.functions import AnyLoss, ImportedLoss, Loss, metric_name
from distributed.config.grad_checkpointing import GradCheckpointing
from distributed.config.image_size import low_res_conflicts, size_conflicts
from distributed.config.models import AnyModel, BuiltInModel, ImportedModel, Model
from distributed.config.optim import AnyOptim, Sgd
from distributed.config.scaling import Scaling
from distributed.config.schedules import Constant, Cosine, EarlyStopping, Linear, OneCycle, Plateau
from distributed.config.schema import AnyPath, OptionalPath, Section, operational, setting
from distributed.config.sections import Checkpoint, Evaluation, Exact, Logging
from distributed.errors import InputError
from distributed.host.importable import SCRIPT, check_module

EngineSection = Annotated[AnyEngine, Field(discriminator="name")]
OptimSection = Annotated[AnyOptim, Field(discriminator="name")]
SweepTable = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
ScheduleSection = Annotated[Constant | Cosine | Linear | OneCycle | Plateau, Field(discriminator="name")]


class TrainConfig(Section):
    """All settings of a run. Its curve depends on `global_batch_size` and `grad_accum_steps`, not on the world size."""

    run_dir: AnyPath = operational(
        Path("runs/default"), "run folder; if not given, runs/<config file> or runs/<model>-<data>"
    )
    seed: int = setting(0, "seed of initial weights, order, augmentation and dropout", ge=0, lt=2**63)
    epochs: int = setting(10, "passes over the training images", gt=0)
    global_batch_size: int = setting(128, "images per optimizer step, over all ranks and micro-batches", gt=0)
    grad_accum_steps: int = setting(1, "micro-batches per optimizer step; batch norm sees one at a time", gt=0)
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16", "float64"] = setting(
        "auto", "precision of the forward and backward pass; auto: bfloat16 if the device has instructions for it, else "
        "float32; with bfloat16 and float16 (autocast), weights and batch-norm statistics stay float32; float16 scales the "
        "loss and skips steps whose gradient overflows; tf32: float32 with the inputs of matrix products rounded to 10 bits "
        "of mantissa, on CUDA"
    )  # fmt: skip
    channels_last: bool = setting(True, "NHWC memory layout of images and convolutions")
    device: Literal["auto", "cpu", "cuda"] = operational("auto", "auto: CUDA if there is a GPU, else the CPU")
    threads: int = operational(
        0, "CPU threads per rank; 0: the machine's available CPUs divided among its ranks", ge=0, le=4096
    )
    timeout_seconds: float = operational(600.0, "fail after waiting this long for an unresponsive rank", gt=0, le=1e7)
    data: DataSection = setting(CifarData(), "the images")
    model: AnyModel = setting(Model(), "the network")
    init_from: OptionalPath = setting(
        None,
        "run folder, checkpoint or .safetensors file to load the initial weights from; a last layer with another number of "
        "classes is initialized randomly",
    )
    cuda_graphs: bool = operational(
        True, "on one GPU, replay training steps as CUDA graphs: bit-identical, several times faster at small batches; never "
        "with grad_checkpointing"
    )  # fmt: skip
    compile: bool = setting(False, "compile the model with torch.compile; in fast mode only")
    grad_checkpointing: GradCheckpointing = setting(GradCheckpointing(), "less memory for activations")
    loss: AnyLoss = setting(Loss(), "the loss")
    optim: OptimSection = setting(Sgd(), "the optimizer")
    schedule: ScheduleSection = setting(OneCycle(), "the learning rate over time")
    early_stopping: EarlyStopping | None = setting(None, "end the run when validation stops improving; none: never")
    engine: EngineSection = setting(Ddp(), "how the model is distributed over the ranks")
    exact: Exact = setting(Exact(), "bit-identical results on any number of processes")
    evaluation: Evaluation = setting(Evaluation(), "measuring on the validation and test splits")
    checkpoint: Checkpoint = setting(Checkpoint(), "when to save and what to keep")
    logging: Logging = setting(Logging(), "logs and curves")
    scaling: Scaling | None = operational(None, "workers on a Ray cluster; for launch.ray_train only")
    sweep: SweepTable = operational(
        {}, "a sweep, one run per trial; for launch.slurm and launch.ray_train only; none: ignore the file's section"
    )

    def shards_on(self, device_type: str) -> int:
        """Return `exact.shards` with auto resolved for `cpu` or `cuda`; 0: exact mode is off."""
        if self.exact.shards != "auto":
            return self.exact.shards
        if (
            device_type != "cpu"
            or self.compile
            or self.grad_checkpointing.enabled
            or self.engine.name == "deepspeed"
            or self.compression
        ):
            return 0
        return 1 << min(8, self._micro_batch_size).bit_length() - 1

    def check_world_size(self, world_size: int, device_type: str) -> None:
        """Raise InputError if there are more processes than shards."""
        shards = self.shards_on(device_type)
        if shards and world_size > shards:
            enough = 1 << (world_size - 1).bit_length()
            remedy = f"exact.shards = {enough}, or 0 for fast mode"
            if enough > self._micro_batch_size:  # a shard has at least one image
                remedy = f"exact.shards = {enough} and global_batch_size = {enough * self.grad_accum_steps} or more"
            raise InputError(
                f"exact.shards = {shards}{' (auto)' if self.exact.shards == 'auto' else ''} is less than the {world_size} "
                f"processes: start at most {shards}, or a new run with {remedy}"
            )

    @property
    def decoded_side(self) -> int | None:
        """Height and width in pixels that images of a folder are decoded to; None for other data."""
        return self.model.input_side if isinstance(self.data, ImageFolderData) else None

    @property
    def resized_side(self) -> int | None:
        """Height and width in pixels that images are resized and cropped to on the device; None: they keep their size."""
        is_done = isinstance(self.data, ImageFolderData) or isinstance(self.model, BuiltInModel)
        return None if is_done else self.model.input_side

    @property
    def imported_functions(self) -> dict[str, str]:
        """The settings that name a function by import path, other than the network's and the data's, and the paths."""
        found = {"loss.name": self.loss.name} if isinstance(self.loss, ImportedLoss) else {}
        found |= {"data.augment.function": path} if (path := self.data.augment.function) else {}
        return found | {f"evaluation.metrics[{metric_name(path)}]": path for path in self.evaluation.metrics}

    def check_importable(self) -> None:
        """Raise InputError unless the module of every import path exists; nothing is imported."""
        self.model.check_importable()
        self.data.check_importable()
        for name, path in self.imported_functions.items():
            check_module(path, name.partition("[")[0])

    @property
    def import_paths(self) -> dict[str, str]:
        """The settings that name code in a module outside this package, as `package.module:name`."""
        sections = {"model.name": self.model, "data.name": self.data}
        imported = {name: s.name for name, s in sections.items() if isinstance(s, ImportedModel | ImportedData)}
        imported |= self.imported_functions
        return {name: path for name, path in imported.items() if not path.startswith(f"{SCRIPT}:")}

    @property
    def compression(self) -> Literal["bfloat16"] | None:
        """The type that gradients are rounded to before they are summed over ranks, if any."""
        return self.engine.compression if isinstance(self.engine, Ddp) else None

    @property
    def best_by(self) -> Literal["accuracy", "loss"] | None:
        """The validation metric that marks the best checkpoint, with `auto` resolved."""
        if self.checkpoint.best_by == "auto":
            return "accuracy" if self.data.validation_fraction else None
        return None if self.checkpoint.best_by == "none" else self.checkpoint.best_by

    @property
    def peak_lr(self) -> float:
        """`optim.lr` scaled to the global batch (linear: Goyal et al. 2017, arXiv 1706.02677)."""
        optim = self.optim
        ratio: float = self.global_batch_size / (optim.lr_base_batch or self.global_batch_size)
        return optim.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_scaling]

    @property
    def _micro_batch_size(self) -> int:
        """Images of the smallest micro-batch, over all ranks."""
        return self.global_batch_size // self.grad_accum_steps

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if conflicts := self._conflicts():
            raise PydanticCustomError("conflict", "{lines}", {"lines": "\n".join(conflicts)})
        return self

    def _conflicts(self) -> list[str]:
        """Return one line, with its remedy, for each group of settings that are valid alone but not together."""
        return [
            *self._sweep_conflicts(),
            *(self.scaling.conflicts(self.device) if self.scaling else []),
            *self._device_conflicts(),
            *self.data.conflicts(),
            *self._side_conflicts(),
            *low_res_conflicts(self.data.augment, self.model, self.epochs),
            *self.engine.conflicts(self.exact.shards, self.precision),
            *self._batch_conflicts(),
            *(compile_conflicts(self.engine, self.exact.shards) if self.compile else []),
            *self.grad_checkpointing.conflicts(self.exact.shards, self.engine, compile=self.compile),
            *self.optim.conflicts(engine=self.engine.name),
            *self.schedule.conflicts(epochs=self.epochs),
            *self._validation_conflicts(),
        ]

    def _sweep_conflicts(self) -> list[str]:
        """Return a line if this is a sweep: the launchers make the config of each of its trials without it."""
        if not self.sweep:
            return []
        return [
            f"sweep ({', '.join(self.sweep)}): sweeps are for python -m launch.slurm and launch.ray_train; use one of them, or "
            "set sweep = none to train once"
        ]

    def _device_conflicts(self) -> list[str]:
        if self.precision == "tf32" and self.device == "cpu":
            return ["precision = tf32 needs CUDA, but device = cpu: set precision = float32, or device = cuda"]
        return []

    def size_conflicts(self, height: int, width: int) -> list[str]:
        """Return one line, with its remedy, for each setting that images of this size in pixels are too small for."""
        return size_conflicts(self.data.augment, self.evaluation, height, width, resized_side=self.resized_side)

    def _side_conflicts(self) -> list[str]:
        if side := self.decoded_side or self.data.image_side:
            return self.size_conflicts(side, side)
        if not isinstance(self.data, ImageFolderData):
            return []  # known once the images are read
        return [
            f"model.name = {self.model.name} needs model.input_side, since image files have any size: set it to the height and "
            "width in pixels that the network takes, e.g. model.input_side = 224"
        ]

    def _batch_conflicts(self) -> list[str]:
        found = []
        shards = self.exact.shards
        if isinstance(shards, int) and shards > max(1, self._micro_batch_size):
            found.append(
                f"exact.shards = {shards} is more than the {self._micro_batch_size} images of a micro-batch: lower it, or "
                "raise global_batch_size"
            )
        if self.grad_accum_steps > self.global_batch_size:
            found.append(
                f"grad_accum_steps = {self.grad_accum_steps} is more than global_batch_size = {self.global_batch_size}: a "
                "micro-batch needs at least one image; lower grad_accum_steps"
            )
        return found

    def _validation_conflicts(self) -> list[str]:
        found = []
        schedule, best_by = self.schedule, self.checkpoint.best_by
        if isinstance(schedule, Plateau) and schedule.restore_best_on_drop and self.best_by != schedule.metric:
            found.append(
                f"schedule.restore_best_on_drop = true needs the best epoch by {schedule.metric}, but checkpoint.best_by = "
                f"{best_by}: set checkpoint.best_by = {schedule.metric}"
            )
        if self.data.validation_fraction:
            return found
        needing = {
            "schedule.name = plateau": ("choose another schedule", isinstance(schedule, Plateau)),
            "early_stopping": ("remove early_stopping", self.early_stopping is not None),
            f"checkpoint.best_by = {best_by}": ("set checkpoint.best_by = none", best_by in ("accuracy", "loss")),
        }
        found += [
            f"{name} needs a validation split: set data.validation_fraction above 0, or {otherwise}"
            for name, (otherwise, is_set) in needing.items()
            if is_set
        ]
        return found
