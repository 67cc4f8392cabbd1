"""Settings of the model, the optimizer, evaluation, checkpoints and logging. Imports no torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, PlainValidator, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from distributed.config.functions import Metrics
from distributed.config.networks import BUILT_IN, FactoryOptions, ImportPath, is_import_path
from distributed.config.schema import Section, operational, setting
from distributed.config.sinks import Mlflow, SinkPaths, Wandb
from distributed.host.importable import check_module

_STORE_URL = re.compile(r"(?:(?:s3|gs)://[a-zA-Z0-9][\w.-]*(?:/[^\s?*#\[\]{}]*)?|file:///[^\s?*#\[\]{}]+)", re.ASCII)


class Model(Section):
    name: Literal["alexnet", "improved_alexnet", "cifar_alexnet", "cifar_alexnet_bn"] = setting(
        "improved_alexnet", "a network of this package"
    )
    init: Literal["torch", "he"] = setting(
        "torch", "initial weights; torch: uniform up to 1 / sqrt(fan_in), biases too; he: uniform up to sqrt(6 / fan_in), "
        "biases zero, for networks without batch norm"
    )  # fmt: skip
    dropout: float = setting(0.5, "dropout probability of the hidden linear layers", ge=0, lt=1)

    @property
    def short_name(self) -> str:
        """The name in the default run folder."""
        return self.name

    @property
    def input_side(self) -> int | None:
        """Height and width in pixels that the network computes on; it resizes smaller images itself."""
        return 224 if self.name == "alexnet" else 32

    def check_importable(self) -> Path | None:
        """Return the file of its module: None, because it is a part of this package."""
        return None


class ImportedModel(Section):
    """A network that a function outside this package builds, with its own initial weights."""

    name: ImportPath = setting(
        ..., "any other network: factory(num_classes=N, **options), e.g. torchvision.models:resnet18",
        examples=["package.module:factory"],
    )  # fmt: skip
    input_side: int | None = setting(
        None, "height and width in pixels that the images are resized and cropped to, on the device; none: they keep their "
        "size; needed for image folders", ge=8, le=4096,
    )  # fmt: skip
    options: FactoryOptions = setting({}, "further keyword arguments of the factory: --model.options.NAME VALUE")

    @property
    def short_name(self) -> str:
        """The name in the default run folder."""
        return self.name.rpartition(":")[2]

    def check_importable(self) -> Path | None:
        """Return the file of its module if it is known; nothing is imported.

        Raises:
            InputError: there is no such module.
        """
        return check_module(self.name, "model.name")


def _model_variant(section: Any) -> str | None:
    """Return the tag of the class that a model section is read as; its name if none fits; None if it is no section."""
    if not isinstance(section, dict | Model | ImportedModel):
        return None
    name = section.get("name", BUILT_IN[0]) if isinstance(section, dict) else section.name
    if name in BUILT_IN:
        return "built_in"
    return "imported" if is_import_path(name) else f"unknown name {name}"


AnyModel = Annotated[
    Annotated[Model, Tag("built_in")] | Annotated[ImportedModel, Tag("imported")], Discriminator(_model_variant)
]
"""The section `model`: its name selects the class."""


def model_from(values: dict[str, Any]) -> Model | ImportedModel:
    """Return the model section with these values, e.g. from an exported file's metadata.

    Raises:
        ValueError: they are not valid.
    """
    section: Model | ImportedModel = TypeAdapter(AnyModel).validate_python(values)
    return section


class _Optim(Section):
    name: str  # defined by the variants; here so that it is the first field
    lr: float = setting(0.1, "learning rate, at lr_base_batch if lr_scaling is set", gt=0, le=100)
    lr_scaling: Literal["none", "linear", "sqrt"] = setting(
        "none", "how lr grows with global_batch_size / lr_base_batch"
    )
    lr_base_batch: int | None = setting(None, "global batch size at which lr applies; only with lr_scaling", gt=0)
    decay_norm_and_bias: bool = setting(False, "apply weight_decay to biases and batch-norm weights too")
    max_grad_norm: float | None = setting(None, "clip the gradient to this L2 norm; none: no clipping", gt=0)
    ema_decay: float | None = setting(
        None, "EMA decay of the weights used for evaluation, e.g. 0.999; none: evaluate the raw weights", gt=0, lt=1
    )

    def conflicts(self) -> list[str]:
        """Return one line per conflict within the section."""
        if self.lr_scaling == "none" and self.lr_base_batch is not None:
            return [
                f"optim.lr_base_batch = {self.lr_base_batch} has no effect with optim.lr_scaling = none: "
                "remove it or set optim.lr_scaling to linear or sqrt"
            ]
        if self.lr_scaling != "none" and self.lr_base_batch is None:
            return [
                f"optim.lr_scaling = {self.lr_scaling} needs optim.lr_base_batch: set it to the global batch size at which "
                "optim.lr applies"
            ]
        return []


class Sgd(_Optim):
    name: Literal["sgd"] = setting("sgd", "SGD with momentum")
    momentum: float = setting(0.9, "momentum; 0: off", ge=0, lt=1)
    nesterov: bool = setting(True, "use Nesterov momentum")
    weight_decay: float = setting(5e-4, "L2 penalty", ge=0, le=1)

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if self.nesterov and not self.momentum:
            found.append("optim.nesterov = true needs momentum: set optim.momentum above 0 or optim.nesterov = false")
        return found


class AdamW(_Optim):
    name: Literal["adamw"] = setting("adamw", "Adam with decoupled weight decay")
    lr: float = setting(1e-3, "learning rate, at lr_base_batch if lr_scaling is set", gt=0, le=100)
    beta1: float = setting(0.9, "decay rate of the gradient's moving average", ge=0, lt=1)
    beta2: float = setting(0.999, "decay rate of the squared gradient's moving average", ge=0, lt=1)
    eps: float = setting(1e-8, "term added to the denominator", gt=0)
    weight_decay: float = setting(0.05, "each step subtracts lr * weight_decay * weight", ge=0, le=1)


def _shard_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 0 and not value & (value - 1)):
        return value
    raise PydanticCustomError("shards", "should be a power of two, e.g. 8, or 0 for fast mode, or auto")


class Exact(Section):
    shards: Annotated[int | Literal["auto"], PlainValidator(_shard_count)] = setting(
        "auto",
        "shards per micro-batch, a power of two: bit-identical results on any number of processes up to this; 0: off, which "
        "is fast mode; auto: on CPU the largest power of two up to 8 that the batch allows, on CUDA 0",
    )


class Evaluation(Section):
    batch_size: int = setting(1000, "images per forward pass, over all ranks", gt=0)
    flip_tta: bool = setting(False, "flip test-time augmentation: add the logits of each image and of its mirror image")
    metrics: Metrics = operational(
        (), "further metrics by import path: function(logits, targets) returns one number per sample, of which the mean is "
        'reported under the function\'s name, e.g. ["net:brier"]'
    )  # fmt: skip
    test_every_epoch: bool = operational(
        True, "evaluate the test split every epoch, for its curve; never used for decisions"
    )


def _store_url(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.isprintable() and _STORE_URL.fullmatch(value)):
        return value
    raise PydanticCustomError(
        "url",
        "should be a URL such as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER, without spaces, ?, *, # and "
        "brackets",
    )


class Checkpoint(Section):
    every_steps: int = operational(0, "also save every N steps; 0: off", ge=0)
    every_minutes: float = operational(5.0, "also save once N minutes have passed since the last save; 0: off", ge=0)
    max_overhead: float = operational(
        0.05, "skip saves at the end of an epoch while saving takes more than this fraction of the time; 1: never skip; "
        "the last epoch and a stop are always saved", gt=0, le=1,
    )  # fmt: skip
    keep_last: int = operational(2, "number of newest checkpoints to keep", ge=1)
    best_by: Literal["auto", "accuracy", "loss", "none"] = setting(
        "auto", "validation metric whose best epoch is kept too; auto: accuracy if there is a validation split"
    )
    upload_to: Annotated[str | None, BeforeValidator(_store_url)] = operational(
        None,
        "URL (s3://, gs://, file://) to which each checkpoint is uploaded, and from which an empty run folder resumes",
    )

    def is_due(self, step: int) -> bool:
        """Return whether `every_steps` requires a save after this many steps."""
        return bool(self.every_steps) and step % self.every_steps == 0


class Logging(Section):
    every_steps: int = operational(50, "steps between lines of training metrics", gt=0)
    level: Literal["DEBUG", "INFO", "WARNING"] = operational("INFO", "minimum log level on the terminal")
    tensorboard: bool = operational(True, "write TensorBoard event files beside metrics.jsonl")
    profile_steps: int = operational(
        0, "profile N steps of rank 0, after the first ten of the attempt, into RUN/profile; 0: off", ge=0, le=1000
    )
    wandb: Wandb | None = operational(None, "log to Weights & Biases; none: off")
    mlflow: Mlflow | None = operational(None, "log to MLflow; none: off")
    sinks: SinkPaths = operational(
        (), "classes of your own that receive the metrics on rank 0, as package.module:Class"
    )
