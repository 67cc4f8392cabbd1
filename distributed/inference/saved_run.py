"""What commands read of a run folder: its config, a checkpoint, what that says of classes and pixels. Imports no torch."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from distributed.config import TrainConfig, load, with_values
from distributed.config.layers import shown
from distributed.data.sources import registry
from distributed.errors import InputError
from distributed.files import read_object
from distributed.run.checkpoint_layout import check_format, committed_names, damage_of, is_committed, preferred
from distributed.run.folder import RunFolder


class Normalization(NamedTuple):
    """Mean and deviation of each channel of pixels in [0, 1], by which a run's images were normalized."""

    mean: list[float]
    deviation: list[float]


def config_of(run: Path) -> TrainConfig:
    """The resolved config in a run's folder.

    Raises:
        InputError: the folder is not there, or no run ever began in it.
    """
    file = RunFolder(run).config_file
    if not os.path.isfile(file):  # of a name too long too
        raise InputError(f"{run}: no config.toml there; RUN is the folder that a training run wrote (its --run_dir)")
    config, _ = load([str(file)])
    return config


def with_data_root(config: TrainConfig, root: Path | None) -> TrainConfig:
    """The config with its data set in another folder; as it was where the folder is None.

    Raises:
        InputError: the run's data lies in no folder.
    """
    if root is None:
        return config
    if not has_data_root(config):
        raise InputError(f"--data.root {root}: this run was on data.name = {config.data.name}; leave it out")
    return with_values(config, data=config.data.model_copy(update={"root": root}))


def on_device(config: TrainConfig, asked: str | None) -> TrainConfig:
    """The config for a finished network on the device asked for: by default the run's, or the CPU if there is no GPU."""
    device = asked or ("auto" if config.device == "cuda" else config.device)
    # TF32 only speeds up training, and no CPU has it: evaluate in float32.
    precision = "float32" if config.precision == "tf32" else config.precision
    return with_values(config, device=device, precision=precision)


def has_data_root(config: TrainConfig) -> bool:
    """Whether the data lies in a folder; else it is generated."""
    return "root" in type(config.data).model_fields


def unfetched(config: TrainConfig) -> TrainConfig:
    """The config with its data taken as it lies: a look at a run must not fetch a data set."""
    if not getattr(config.data, "download", False):
        return config
    return with_values(config, data=config.data.model_copy(update={"download": False, "urls": ()}))


def checkpoint_of(run: Path, name: str) -> Path:
    """The folder of a checkpoint by its name; of `auto` best, if there is one, else latest, else the newest.

    Raises:
        InputError: there is none of that name.
    """
    folder = RunFolder(run).checkpoints
    # Not all of them: without a usable newest checkpoint an older one must be asked for by name.
    for candidate in preferred(folder)[:3] if name == "auto" else [folder / name]:
        if is_committed(candidate):
            found = candidate.resolve()
            if found.parent != folder.resolve():
                raise InputError(
                    f"--checkpoint {candidate.name}: leads to {found}, out of {folder}; name one that lies in it, or its run"
                )
            return found
    there = ", ".join(committed_names(folder)) or "none"
    raise InputError(f"--checkpoint {shown(name)}: not in {folder}; there are: {there}")


def check_whole(checkpoint: Path) -> None:
    """Raises InputError if a checkpoint's files are not those that its manifest names, or of a newer version."""
    check_format(checkpoint)
    if damage := damage_of(checkpoint):
        raise InputError(f"{checkpoint}: damaged: {damage}; name another with --checkpoint")


def content_of(checkpoint: Path) -> dict[str, Any]:
    """What its state.json holds.

    Raises:
        InputError: names of classes or a normalization that are none.
    """
    content = read_object(checkpoint / "state.json")
    names, normalization = content.get("classes") or [], content.get("normalization") or {"mean": [], "deviation": []}
    try:
        odd = not isinstance(names, list)
        for part in ("mean", "deviation"):
            odd |= not all(isinstance(value, float | int) for value in normalization[part])
    except (KeyError, TypeError):
        odd = True
    if odd:
        raise InputError(
            f"{checkpoint}/state.json: its classes or normalization are of another version; name another with --checkpoint"
        )
    return content


def classes_of(content: dict[str, Any], config: TrainConfig) -> list[str]:
    """The names of the classes as a checkpoint has them; those of older versions leave it to the data set."""
    return list(content.get("classes") or registry.class_names(config.data))


def normalization_of(content: dict[str, Any]) -> Normalization | None:
    """As a checkpoint or the data's facts have it; None in checkpoints of older versions."""
    saved = content.get("normalization")
    return Normalization(saved["mean"], saved["deviation"]) if saved else None
