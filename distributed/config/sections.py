"""The settings of network, optimizer, engine and of what a run writes. Imports no torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainValidator
from pydantic_core import PydanticCustomError

from distributed.config.schema import OptionalPath, Section, operational, setting

_STORE_URL = re.compile(r"(?:(?:s3|gs)://[a-zA-Z0-9][\w.-]*(?:/[^\s?*#\[\]{}]*)?|file:///[^\s?*#\[\]{}]+)", re.ASCII)


class Model(Section):
    name: Literal["alexnet", "improved_alexnet", "cifar_alexnet", "cifar_alexnet_bn"] = setting(
        "improved_alexnet", "the network"
    )
    init: Literal["torch", "he"] = setting(
        "torch", "torch: uniform up to 1 / sqrt(fan_in), biases too; he: up to sqrt(6 / fan_in), biases zero, for "
        "networks without batch norm"
    )  # fmt: skip
    dropout: float = setting(0.5, "probability that a unit of a hidden linear layer is dropped", ge=0, lt=1)

    @property
    def input_side(self) -> int:
        """Height and width in pixels that the network computes on; smaller images it resizes itself."""
        return 224 if self.name == "alexnet" else 32


class _Optim(Section):
    name: str  # of the variants, here for its place before the others
    lr: float = setting(0.1, "learning rate at `lr_base_batch`, or as it is without scaling", gt=0, le=100)
    lr_scaling: Literal["none", "linear", "sqrt"] = setting(
        "none", "how lr grows with global_batch_size / lr_base_batch"
    )
    lr_base_batch: int | None = setting(None, "global batch at which lr holds; only with lr_scaling", gt=0)
    decay_norm_and_bias: bool = setting(False, "apply weight_decay to biases and batch norm's weights too")
    max_grad_norm: float | None = setting(None, "scale the gradient down to this L2 norm where it is larger", gt=0)
    ema_decay: float | None = setting(
        None, "evaluate a moving average of the weights with this decay, as .999; none: the weights", gt=0, lt=1
    )


class Sgd(_Optim):
    name: Literal["sgd"] = setting("sgd", "the optimizer")
    momentum: float = setting(0.9, "momentum", ge=0, lt=1)
    nesterov: bool = setting(True, "Nesterov's form of momentum")
    weight_decay: float = setting(5e-4, "L2 penalty", ge=0, le=1)


class AdamW(_Optim):
    name: Literal["adamw"] = setting("adamw", "Adam with decoupled weight decay")
    lr: float = setting(1e-3, "learning rate at `lr_base_batch`, or as it is without scaling", gt=0, le=100)
    beta1: float = setting(0.9, "decay of the mean of gradients", ge=0, lt=1)
    beta2: float = setting(0.999, "decay of the mean of squared gradients", ge=0, lt=1)
    eps: float = setting(1e-8, "added to the root of the mean square", gt=0)
    weight_decay: float = setting(0.05, "part of a weight, times lr, that is taken off each step", ge=0, le=1)


class Loss(Section):
    label_smoothing: float = setting(
        0.0, "part of the training target that is spread over all classes (Szegedy et al. 2016)", ge=0, lt=1
    )


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
    flip_tta: bool = setting(False, "add the logits of each image and of its mirror image")
    test_every_epoch: bool = operational(True, "evaluate the test split each epoch, for its curve; it never steers")


def _store_url(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.isprintable() and _STORE_URL.fullmatch(value)):
        return value
    raise PydanticCustomError(
        "url",
        "should be a URL as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER, without spaces, ?, *, # and brackets",
    )


class Checkpoint(Section):
    every_steps: int = operational(0, "save every N steps too; 0: off", ge=0)
    every_minutes: float = operational(5.0, "save once N minutes have passed since the last save; 0: off", ge=0)
    max_overhead: float = operational(
        0.05, "skip saves at the end of an epoch while saves take more than this fraction of the time; 1: never skip; "
        "the last epoch and a stop are always saved", gt=0, le=1,
    )  # fmt: skip
    keep_last: int = operational(2, "newest checkpoints that are kept", ge=1)
    best_by: Literal["auto", "accuracy", "loss", "none"] = setting(
        "auto", "validation metric whose best epoch is kept too; auto: accuracy where there is a validation split"
    )
    upload_to: Annotated[str | None, BeforeValidator(_store_url)] = operational(
        None,
        "URL (s3://, gs://, file://) where each checkpoint is kept too, and from where an empty run folder goes on",
    )

    def is_due(self, step: int) -> bool:
        """Whether `every_steps` asks for a save after this many steps."""
        return bool(self.every_steps) and step % self.every_steps == 0


class Logging(Section):
    every_steps: int = operational(50, "steps between lines of training metrics", gt=0)
    level: Literal["DEBUG", "INFO", "WARNING"] = operational("INFO", "least level shown on the terminal")
    tensorboard: bool = operational(True, "write TensorBoard event files beside metrics.jsonl")
    profile_steps: int = operational(
        0, "profile this many steps of rank 0 after the attempt's first ten, into RUN/profile; 0: off", ge=0, le=1000
    )


class Scaling(Section):
    """What `launch.ray_train` asks a Ray cluster for; the other launchers have options of their own."""

    num_workers: int = operational(2, "processes, a Ray worker each", ge=1, le=65536)
    min_workers: int | None = operational(
        None, "go on with as few as this where more are not to be had, and grow back; none: always num_workers", ge=1
    )
    cpus_per_worker: int = operational(
        1, "cores reserved for a worker, and its threads unless `threads` says otherwise", ge=1, le=4096
    )
    gpus_per_worker: int = operational(0, "GPUs reserved for a worker", ge=0, le=1)
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = operational(
        "pack", "workers on few nodes or on many; strict: on one node, or no two on a node"
    )
    max_failures: int = operational(
        3, "failures in a row, without a checkpoint between them, that are survived; drained nodes do not count", ge=0
    )
    wait_seconds: float = operational(60.0, "wait for room on the cluster before giving up", ge=0, le=1e7)
    resize_seconds: float = operational(
        30.0, "how often a run on fewer than num_workers looks for room to grow", gt=0, le=1e7
    )
    storage_path: OptionalPath = operational(None, "folder that all nodes share, in which a relative run_dir lies")

    @property
    def least_workers(self) -> int:
        """The fewest that the run may go on with."""
        return self.min_workers or self.num_workers

    def conflicts(self, device: str) -> list[str]:
        """Settings that are each valid but cannot stand together, a line each."""
        found = []
        if self.least_workers > self.num_workers:
            found.append(
                f"scaling.min_workers = {self.min_workers} is more than scaling.num_workers = {self.num_workers}: lower it"
            )
        if self.min_workers and self.placement.startswith("strict"):
            found.append(
                f"scaling.placement = {self.placement} with scaling.min_workers: a run that grows takes the room there is; "
                f"set {self.placement.removeprefix('strict_')}, or leave min_workers out"
            )
        if device == "cuda" and not self.gpus_per_worker:
            found.append("device = cuda, and scaling.gpus_per_worker = 0: Ray would hide the GPUs; set it to 1")
        if device == "cpu" and self.gpus_per_worker:
            found.append("device = cpu, and scaling.gpus_per_worker = 1 reserves GPUs for nothing: set it to 0")
        return found
