"""The settings in which two configs differ, and which of them a run may change when it resumes. Imports no torch."""

import json
from typing import Any, NamedTuple

from distributed.config.leaves import leaves, table_around
from distributed.config.train_config import TrainConfig


class Difference(NamedTuple):
    """A setting that differs between two configs. None also stands for a missing setting."""

    path: str
    old: Any
    new: Any


def differences(old: TrainConfig, new: TrainConfig) -> list[Difference]:
    """Return every setting that differs, except `exact.shards` and `precision` if either is auto: only the run resolves it."""
    flat_old, flat_new = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return [
        Difference(path, flat_old.get(path), flat_new.get(path))
        for path in dict.fromkeys([*flat_old, *flat_new])
        if _differs(path, flat_old, flat_new)
    ]


def _differs(path: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    before, now = old.get(path), new.get(path)
    if table_around(path) and (path in old) != (path in new):  # a factory's argument may default to something else
        return True
    # As JSON, in which 1, 1.0 and true differ.
    is_resolved_later = path in ("exact.shards", "precision") and "auto" in (before, now)
    return json.dumps(before) != json.dumps(now) and not is_resolved_later


def changes_experiment(path: str, config: TrainConfig) -> bool:
    """Return whether a run that resumes with another value of this setting would be a different experiment."""
    if path == "epochs":  # the learning rate depends on it only if the schedule spans the entire run
        return config.schedule.name not in ("constant", "plateau")
    return not any(leaf.path == path and leaf.operational for leaf in leaves())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by their dotted names. An empty dict is kept only as the value of an option."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        is_group = isinstance(value, dict) and (value or prefix.count(".") < 2)  # deeper, {} is an option's value
        found |= flat(value, f"{prefix}{key}.") if is_group else {prefix + key: value}
    return found
