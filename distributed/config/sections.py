"""Settings of exact mode, evaluation, checkpoints and logging. Imports no torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainValidator
from pydantic_core import PydanticCustomError

from distributed.config.functions import Metrics
from distributed.config.schema import Section, operational, setting
from distributed.config.sinks import Mlflow, SinkPaths, Wandb

_STORE_URL = re.compile(r"(?:(?:s3|gs)://[a-zA-Z0-9][\w.-]*(?:/[^\s?*#\[\]{}]*)?|file:///[^\s?*#\[\]{}]+)", re.ASCII)


def _shard_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 0 and not value & (value - 1)):
        return value
    raise PydanticCustomError("shards", "should be a power of two, e.g. 8, or 0 for fast mode, or auto")


class Exact(Section):
    shards: Annotated[int | Literal["auto"], PlainValidator(_shard_count)] = setting(
        "auto",
        "shards per micro-batch, a power of two: bit-identical results on any number of processes up to this; 0: off, which "
        "is fast mode; auto: on CPU the largest power of two up to 8 that the batch allows; 0 on CUDA, and with deepspeed, "
        "compile, grad_checkpointing or engine.compression",
    )


class Evaluation(Section):
    batch_size: int = setting(1000, "images per forward pass, over all ranks", gt=0)
    flip_tta: bool = setting(
        False, "flip test-time augmentation: average the logits of each image and of its mirror image"
    )
    shift_tta: int = setting(
        0, "shift test-time augmentation: also average over the image shifted by this many pixels up and left, and down and "
        "right, at half weight each; 0: off", ge=0, le=64,
    )  # fmt: skip
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
    curves: bool = operational(True, "draw curves.png when the run finishes")
    profile_steps: int = operational(
        0, "profile N steps of rank 0, after the first ten of the attempt, into RUN/profile; 0: off", ge=0, le=1000
    )
    wandb: Wandb | None = operational(None, "log to Weights & Biases; none: off")
    mlflow: Mlflow | None = operational(None, "log to MLflow; none: off")
    sinks: SinkPaths = operational(
        (), "classes of your own that receive the metrics on rank 0, as package.module:Class"
    )
