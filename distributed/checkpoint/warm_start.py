"""Reads weights that did not come from this run: to evaluate them, or to start a new run from them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed.checkpoint.download import store_has_run
from distributed.checkpoint.fit import explained, fit_weights
from distributed.checkpoint.tensor_file import read_tensors
from distributed.config import TrainConfig
from distributed.errors import InputError, reachable_paths
from distributed.run.checkpoint_layout import check_format, damage_of
from distributed.run.folder import RunFolder
from distributed.run.weights_file import check_weights_file, check_weights_folder, is_weights_file
from distributed.topology import Topology


def evaluation_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights and buffers that a checkpoint is evaluated with, by the model's names: the EMA if there is one.

    Raises:
        InputError: its tensors cannot be read.
    """
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}; name another checkpoint") from None
    except FileNotFoundError:
        raise InputError(
            f"{path}: deleted by a run that is still training; try again, or name another checkpoint"
        ) from None
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    ema = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    return weights | ema


def start_from(config: TrainConfig, topology: Topology, model: nn.Module) -> None:
    """Copy the weights that `init_from` names into the model; nothing else is loaded. A run that has saved keeps its own.

    One layer with a different number of classes, usually the last, keeps its random initialization.

    Args:
        model: on the CPU; becomes float64 if that is the run's precision.

    Raises:
        InputError: there are no such weights, they are damaged, or they belong to another network.
    """
    path = config.init_from
    if path is None or RunFolder(config.run_dir).has_saved():
        return
    if config.checkpoint.upload_to and not path.exists() and (not topology.is_main or store_has_run(config, None)):
        return  # the run resumes from the store, which rank 0 queries; if it does not, the ranks' weights differ
    if config.precision == "float64":
        model.double()
    found, source = _read(path)
    own = model.state_dict()
    fit = fit_weights(own, found, ignored=dict(model.named_buffers()).keys() - own.keys())
    if fit.misfits:
        raise InputError(f"init_from = {path}: {explained(fit, own, found, path, model_name=config.model.name)}")
    # A buffer may have infinities of its own, e.g. an attention mask.
    if bad := [
        name for name in fit.names if not _is_finite(found[name]) and not _same_infinities(own[name], found[name])
    ]:
        raise InputError(f"init_from = {path}: {bad[0]} has values that are not finite; name another file")
    with torch.no_grad():
        for name in fit.names:
            own[name].copy_(found[name])
    note = f"; {fit.resized_layer} keeps its random initialization" if fit.resized_layer is not None else ""
    logger.info("starting from the weights of {}{}", source, note)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _same_infinities(one: Tensor, other: Tensor) -> bool:
    return not bool(other.float().isnan().any()) and torch.equal(one.float().isinf(), other.float().isinf())


def _read(path: Path) -> tuple[Mapping[str, Tensor], Path]:
    """Return the tensors that a run, a checkpoint or a safetensors file starts with, and the checkpoint or file."""
    if is_weights_file(path):
        check_weights_file(path)
        try:
            found = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"init_from = {path}: cannot be read ({error}); copy it again, or name another") from None
        return found, path
    checkpoint = check_weights_folder(path)
    check_format(checkpoint)
    with reachable_paths():
        if damage := damage_of(checkpoint):
            raise InputError(
                f"init_from = {path}: {checkpoint.name} is damaged: {damage}; name another checkpoint of that run"
            )
        return evaluation_weights(checkpoint), checkpoint
