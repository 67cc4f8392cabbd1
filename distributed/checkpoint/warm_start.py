"""Reads the weights of another run, to evaluate them or to start a new run from them."""

from pathlib import Path

from loguru import logger
from torch import Tensor

from distributed.checkpoint.snapshot import load_weights_and_reset_optimizer
from distributed.checkpoint.tensor_file import read_tensors
from distributed.engine.protocol import Engine
from distributed.errors import InputError
from distributed.run.checkpoint_layout import check_format, damage_of, find_checkpoint


def evaluation_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights and buffers that a checkpoint is evaluated with, by the model's names: the EMA if there is one.

    Raises:
        InputError: its tensors cannot be read.
    """
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}; name another checkpoint") from None
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    ema = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    return weights | ema


def load_initial_weights(path: Path, engine: Engine) -> None:
    """Start from the weights of another run or of one of its checkpoints; nothing else is loaded.

    One layer with a different number of classes, usually the last, keeps its random initialization.

    Raises:
        InputError: there is no complete checkpoint, or it belongs to another model.
    """
    checkpoint = find_checkpoint(path)
    check_format(checkpoint)
    if damage := damage_of(checkpoint):
        raise InputError(
            f"init_from = {path}: {checkpoint.name} is damaged: {damage}; name another checkpoint of that run"
        )
    found = {f"model.{name}": tensor for name, tensor in evaluation_weights(checkpoint).items()}
    own = {name: tensor for name, tensor in engine.state() if name.startswith("model.")}
    resized = [name for name in own if name in found and _differs_in_rows(own[name], found[name])]
    layers = {name.rpartition(".")[0].removeprefix("model.") for name in resized}
    if len(layers) > 1:
        resized = []  # not only the layer of the classes: loading fails and names the first tensor
    try:
        load_weights_and_reset_optimizer(engine, found | {name: own[name] for name in resized})
    except ValueError as error:
        raise InputError(f"init_from = {path}: {error}; name a run of the same network") from None
    note = f"; {layers.pop()} keeps its random initialization" if resized else ""
    logger.info("starting from the weights of {}{}", checkpoint, note)


def _differs_in_rows(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ in size, but in the first dimension only."""
    return one.dim() == other.dim() > 0 and len(one) != len(other) and one.shape[1:] == other.shape[1:]
