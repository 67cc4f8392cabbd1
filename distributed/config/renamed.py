"""Settings of earlier versions that were renamed or removed. Imports no torch.

In the config that a run has saved, both names are accepted, so that old runs can be resumed, evaluated and compared.
On the command line and in a user's file an old name is an error that names the new one.
"""

import copy
from pathlib import Path
from typing import Any

RENAMED = {
    "accumulation": "grad_accum_steps",
    "data.side": "model.input_side",
    "evaluation.flips": "evaluation.flip_tta",
    "model.initial_weights": "model.init",
    "optim.clip_norm": "optim.max_grad_norm",
    "schedule.return_to_best": "schedule.restore_best_on_drop",
}
"""Old dotted path -> new one. One that moved to another section is not written there if it was none."""

REMOVED = {"engine.powersgd_rank": "PowerSGD was removed; remove this setting"}
"""Dotted path of a removed setting, whose default was none -> message for a user who sets it."""

REMOVED_VALUES = {
    ("engine.compression", "powersgd"): "PowerSGD was removed; set engine.compression = bfloat16 or remove this setting"
}
"""(dotted path, removed value) -> message for a user who sets it."""


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a saved config with every old key under its new name and removed settings dropped.

    Raises:
        ValueError: a setting appears under both names, or has a value that was removed.
    """
    upgraded = copy.deepcopy(values)
    for old, new in RENAMED.items():
        section, key = _section_of(upgraded, old)
        if key not in section:
            continue
        new_section, new_key = _section_of(upgraded, new)
        if new_section is not section and section[key] in (None, "none"):
            section.pop(key)
            continue
        if new_key in new_section:
            raise ValueError(f"{old} and {new} are the same setting; remove {old}")
        new_section[new_key] = section.pop(key)
    for (path, value), message in REMOVED_VALUES.items():
        section, key = _section_of(upgraded, path)
        if section.get(key) == value:
            reason = message.partition(";")[0]
            raise ValueError(f"{path} = {value}: {reason}; use the version that started this run")
    for path in REMOVED:
        section, key = _section_of(upgraded, path)
        if section.get(key) is None:
            section.pop(key, None)
    return upgraded


def is_saved_by_a_run(file: Path) -> bool:
    """Return whether a config file is the one that a run wrote into its own folder."""
    return file.name == "config.toml" and (file.parent / "status.json").is_file()


def _section_of(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the section that holds a dotted path, empty if there is none, and the last key."""
    *sections, key = path.split(".")
    section: Any = values
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}, key
