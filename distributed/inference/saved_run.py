"""Reads a run folder: its config, a checkpoint, the class names and normalization saved there. Imports no torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from distributed.config import TrainConfig, read_saved, with_values
from distributed.config.engines import DeepSpeed
from distributed.config.layers import shown
from distributed.errors import InputError
from distributed.files import read_object
from distributed.host.importable import changed_modules, module_files
from distributed.run.checkpoint_layout import STATE, check_format, committed_names, damage_of, is_committed, preferred
from distributed.run.folder import RunFolder


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: list[float]
    deviation: list[float]


def read_config(run: Path) -> TrainConfig:
    """Return the resolved config of a run.

    Raises:
        InputError: the folder does not exist, or no run ever started in it.
    """
    file = RunFolder(run).config_file
    if not os.path.isfile(file):  # unlike Path.is_file, also False for a name that is too long
        raise InputError(f"{run}: no config.toml there; RUN is the folder that a training run wrote (its --run_dir)")
    return read_saved(file)


def with_data_root(config: TrainConfig, root: Path | None) -> TrainConfig:
    """Return the config with its data set in folder `root` and the default cache; unchanged if `root` is None.

    Raises:
        InputError: the run's data set is generated, so it has no folder.
    """
    if root is None:
        return config
    if not has_data_root(config):
        raise InputError(f"--data.root {root}: this run used data.name = {config.data.name}; leave it out")
    moved: dict[str, Any] = {"root": root} | ({"cache": None} if hasattr(config.data, "cache") else {})
    return with_values(config, data=config.data.model_copy(update=moved))


def has_data_root(config: TrainConfig) -> bool:
    """Return whether the data set is read from a folder instead of generated."""
    return "root" in type(config.data).model_fields


def for_device(config: TrainConfig, requested: str | None, saved: Mapping[str, Any] | None) -> TrainConfig:
    """Return the config for evaluation on a device; by default the run's, or the CPU if it was CUDA and no GPU is here.

    It never compiles: that takes longer than one evaluation, and needs a compiler on this machine. Nor does it capture CUDA
    graphs, for which a loss has limits.

    Args:
        saved: content of one of the run's state.json, if it has saved.
    """
    device = requested or ("auto" if config.device == "cuda" else config.device)
    exact = config.exact
    # What auto meant on the device of the training.
    if exact.shards == "auto" and (config.compile or (saved and saved.get("bits", {}).get("shards") == 0)):
        exact = exact.model_copy(update={"shards": 0})
    # TF32 only speeds up training, and no CPU has it: evaluate in float32.
    precision = "float32" if config.precision == "tf32" else config.precision
    engine = config.engine
    if isinstance(engine, DeepSpeed):  # evaluation has no optimizer to offload
        engine = engine.model_copy(update={"offload_optimizer": False})
    # A launcher set the threads to the CPUs of its machine.
    return with_values(
        config,
        device=device,
        precision=precision,
        engine=engine,
        exact=exact,
        threads=0,
        compile=False,
        cuda_graphs=False,
    )


def without_download(config: TrainConfig) -> TrainConfig:
    """Return the config with downloads turned off: inspecting a run must not fetch a data set."""
    if not getattr(config.data, "download", False):
        return config
    return with_values(config, data=config.data.model_copy(update={"download": False, "urls": ()}))


def choose_checkpoint(run: Path, name: str) -> Path:
    """Return the folder of a checkpoint; for the name `auto`, the first of best, latest and newest that exists.

    Raises:
        InputError: no such checkpoint.
    """
    folder = RunFolder(run).checkpoints
    # At most three: an older checkpoint must be named explicitly.
    for candidate in preferred(folder)[:3] if name == "auto" else [folder / name]:
        if is_committed(candidate):
            found = candidate.resolve()
            if found.parent != folder.resolve():
                raise InputError(
                    f"--checkpoint {candidate.name}: leads to {found}, outside {folder}; name one inside it, or its own run"
                )
            return found
    names = ", ".join(committed_names(folder)) or "none yet"
    raise InputError(f"--checkpoint {shown(name)}: not in {folder}; choose one of: {names}")


def check_complete(checkpoint: Path) -> None:
    """Raise InputError if a checkpoint's files do not match its manifest, or its format is newer than this version's."""
    check_format(checkpoint)
    if damage := damage_of(checkpoint):
        _check_not_deleted(checkpoint)
        raise InputError(f"{checkpoint}: damaged: {damage}; name another with --checkpoint")


def read_content(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json, which has valid class names, normalization and image size.

    Raises:
        InputError: one of them is missing or has the wrong type.
    """
    content = read_object(checkpoint / STATE)
    names, size, normalization = (content.get(key, ()) for key in ("classes", "image_size", "normalization"))
    valid = _is_list(names, str) and _is_list(size, int) and len(size) == 2 and min(size) > 0
    if (
        not valid
        or not isinstance(normalization, dict)
        or not all(_is_list(normalization.get(key), int, float) for key in Normalization._fields)
    ):
        _check_not_deleted(checkpoint)
        raise InputError(
            f"{checkpoint}/state.json: classes, normalization or image_size from another version; name another with "
            "--checkpoint"
        )
    return content


def _check_not_deleted(checkpoint: Path) -> None:
    """Raise InputError if a checkpoint that was there is gone."""
    if not checkpoint.is_dir():
        raise InputError(
            f"{checkpoint}: deleted by a run that is still training; try again, or name another checkpoint"
        )


def _is_list(value: Any, *types: type) -> bool:
    """Return whether a value from JSON is a list of one or more elements of these types."""
    return isinstance(value, list) and bool(value) and all(type(element) in types for element in value)


def warn_about_changes(content: dict[str, Any], import_paths: Mapping[str, str]) -> None:
    """Warn about modules whose files differ from those of the training run.

    Args:
        content: that of the checkpoint's state.json.
        import_paths: those in use, by setting.
    """
    for module in changed_modules(content.get("modules"), module_files(import_paths)):
        logger.warning(
            "{} has changed since training: sha256 {} then, {} now; unless only comments changed, results may differ",
            *module,
        )
