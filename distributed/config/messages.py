"""Pydantic's errors as lines for the user: `place: setting = value: what is wrong; remedy`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from distributed.config.data import DATA_EXAMPLE, DATA_NAMES
from distributed.config.functions import LOSS_EXAMPLE, LOSS_NAMES
from distributed.config.hints import known, unknown
from distributed.config.layers import Settings, shown
from distributed.config.leaves import leaves, table_around
from distributed.config.networks import name_hint
from distributed.errors import without_password

_NAME_IN_TABLE = ("[key]",)  # pydantic's end of a location, after the name


@dataclass(frozen=True)
class _Problem:
    """One invalid value: its dotted path, the variant of its section if there are several, and pydantic's message."""

    path: str
    value: Any
    variants: list[str]
    message: str


def explain(detail: ErrorDetails, settings: Settings) -> list[str]:
    """Return the lines for one of pydantic's errors; a conflict has its own lines."""
    if detail["type"] == "conflict":
        return str(detail["msg"]).splitlines()
    path, variants = dotted_path(detail["loc"], settings.values)
    value = detail["input"]
    if detail["type"] == "union_tag_invalid":
        path = f"{path}.name"
        value = value["name"] if isinstance(value, dict) else value
    reason = _REASONS.get(detail["type"], _invalid)(_Problem(path, value, variants, str(detail["msg"])))
    is_name = detail["loc"][-1:] == _NAME_IN_TABLE
    value_text = (
        f" = {without_password(shown(value))}" if not is_name and (not isinstance(value, dict) or value) else ""
    )
    return [f"{_place(path, settings.places)}: {shown(path)}{value_text}: {reason}"]


def dotted_path(location: tuple[int | str, ...], values: Any) -> tuple[str, list[str]]:
    """Return the dotted path of an error's location, and separately the tags that pydantic adds after a union."""
    path: list[str] = []
    tags: list[str] = []
    location = location[:-1] if location[-1:] == _NAME_IN_TABLE else location
    for index, name in enumerate(location):
        last = index == len(location) - 1
        if isinstance(values, dict) and name not in values and not last:
            tags.append(str(values.get("name", name)))
            continue
        path.append(str(name))
        values = values.get(name) if isinstance(values, dict) else None
    return ".".join(path), tags


def _place(path: str, places: dict[str, str]) -> str:
    """Return where a setting was set: itself, a setting inside it, or its section."""
    inside = next((key for key in places if key.startswith(f"{path}.")), "")
    return next((places[key] for key in (path, inside, path.rpartition(".")[0]) if key in places), "config")


def _unknown(problem: _Problem) -> str:
    path, table = problem.path, table_around(problem.path)
    owners = sorted({leaf.variant for leaf in leaves() if leaf.path in (path, table and table.path) and leaf.variant})
    if owners and problem.variants:
        section = path.partition(".")[0]
        here = ", ".join(problem.variants)
        return f"belongs to {section}.name = {' or '.join(owners)}, but here it is {here}; remove one of them"
    if path in known():
        return "unknown setting; write a dotted name without quotes"
    return unknown(path)


def _unknown_name(problem: _Problem) -> str:
    choices = " | ".join(leaf.choices for leaf in leaves() if leaf.path == problem.path)
    hints = {
        "model.name": name_hint(problem.value),
        "data.name": name_hint(problem.value, DATA_NAMES, DATA_EXAMPLE),
        "loss.name": name_hint(problem.value, LOSS_NAMES, LOSS_EXAMPLE),
    }
    hint = f"; {hints[problem.path]}" if problem.path in hints else ""
    return f"should be one of {choices}{hint}"


def _not_a_section(problem: _Problem) -> str:
    example = next(leaf.path for leaf in leaves() if leaf.path.startswith(problem.path.removesuffix("name")))
    return f"is a section; set its fields, e.g. --{example} VALUE"


def _not_a_table(problem: _Problem) -> str:
    return f"is a table; set what is in it, e.g. --{problem.path}.NAME VALUE"


def _invalid(problem: _Problem) -> str:
    message = problem.message.removeprefix("Input ").removeprefix("should ")
    is_list = isinstance(problem.value, str) and "," in problem.value and message.startswith("be a valid ")
    sweep = (
        f"; to train once per value: launch.slurm ... --sweep.{problem.path} {shown(problem.value)}" if is_list else ""
    )
    return f"should {message[:1].lower()}{message[1:]}{sweep}" if "should" in problem.message else message


_REASONS: dict[str, Callable[[_Problem], str]] = {
    "extra_forbidden": _unknown,
    "union_tag_invalid": _unknown_name,
    "model_type": _not_a_section,
    "model_attributes_type": _not_a_section,
    "union_tag_not_found": _not_a_section,
    "dict_type": _not_a_table,
}
"""Pydantic's error type -> what is wrong and the remedy; `_invalid` for the others."""
