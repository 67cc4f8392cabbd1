"""Weights of another run: those it evaluates with, and beginning a run with them."""

from pathlib import Path

from loguru import logger
from torch import Tensor

from distributed.checkpoint.tensor_file import tensors_of
from distributed.engine.protocol import Engine
from distributed.errors import InputError
from distributed.run.checkpoint_layout import check_format, damage_of
from distributed.run.folder import find_checkpoint


def evaluated_weights(path: Path) -> dict[str, Tensor]:
    """The weights and buffers that a run evaluates with, by the model's names: the averages where it has them.

    Raises:
        InputError: it holds no tensors.
    """
    try:
        tensors = tensors_of(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}; name another checkpoint") from None
    found = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    averages = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    return found | averages


def start_from(path: Path, engine: Engine) -> None:
    """Begin with the weights of another run, or of one of its checkpoints; everything else is as at the start.

    A last layer of another number of classes keeps its initial weights.

    Raises:
        InputError: no whole checkpoint there, or one of another model.
    """
    checkpoint = find_checkpoint(path)
    check_format(checkpoint)
    if damage := damage_of(checkpoint):
        raise InputError(
            f"init_from = {path}: {checkpoint.name} is damaged: {damage}; name another checkpoint of that run"
        )
    found = {f"model.{name}": tensor for name, tensor in evaluated_weights(checkpoint).items()}
    own = {name: tensor for name, tensor in engine.state() if name.startswith("model.")}
    last = list(own)[-1].rpartition(".")[0]
    afresh = [name for name in own if name in found and name.startswith(last) and own[name].shape != found[name].shape]
    try:
        engine.load_state(found | {name: own[name] for name in afresh})
    except ValueError as error:
        raise InputError(f"init_from = {path}: {error}; name a run of the same network") from None
    logger.info(
        "starting from the weights of {}{}",
        checkpoint,
        f"; {last.removeprefix('model.')} starts afresh" if afresh else "",
    )
