"""All settings as a flat list of dotted paths, derived from the tree, for the command line, --help and messages."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distributed.config.networks import is_import_path
from distributed.config.train_config import TrainConfig


@dataclass(frozen=True)
class Leaf:
    """One setting.

    `path` is dotted, e.g. `optim.lr`; `variant` is the `name` of the section that has it, if there are several.
    """

    path: str
    annotation: Any
    default: Any
    doc: str
    operational: bool
    variant: str | None

    @property
    def is_table(self) -> bool:
        """Whether any settings may be inside it, e.g. `model.options.width` in `model.options`."""
        return get_origin(self.annotation) is dict

    @property
    def takes_text(self) -> bool:
        """Whether any value on the command line is taken as text, even `123`."""
        if self.is_table or get_origin(self.annotation) is tuple:
            return False
        alternatives = get_args(self.annotation) or (self.annotation,)
        return get_origin(self.annotation) is Literal or any(
            isinstance(a, type) and not issubclass(a, bool | int | float) and a is not type(None) for a in alternatives
        )

    @property
    def takes_none(self) -> bool:
        """Whether the word none stands for no value. Where it does not, it is text like any other."""
        return type(None) in get_args(self.annotation) or not self.takes_text

    @property
    def choices(self) -> str:
        """The type for --help: `int`, `true | false`, `sgd | adamw`."""
        if get_origin(self.annotation) is Literal:
            return " | ".join(map(str, get_args(self.annotation)))
        if self.is_table:
            return "table"
        if self.variant and self.path.endswith(".name"):
            return self.variant
        if get_origin(self.annotation) is tuple:
            return f"list of {get_args(self.annotation)[0].__name__}"
        names = {bool: "true | false", type(None): "none"}
        alternatives = [a for a in get_args(self.annotation) or (self.annotation,) if not hasattr(a, "strict")]
        alternatives = [get_args(a)[0] if get_origin(a) is Annotated else a for a in alternatives]
        texts = [get_args(a) if get_origin(a) is Literal else [names.get(a, a.__name__.lower())] for a in alternatives]
        return " | ".join(str(text) for group in texts for text in group)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes that a field may hold: none for a plain value, several for a union selected by `name`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [s for a in get_args(annotation) for s in sections_of(a)]
    return []


def variant_name(section: type[BaseModel]) -> str:
    """Return the choices of `name` that select this section among others."""
    name = section.model_fields["name"]
    return " | ".join(get_args(name.annotation)) or str((name.examples or [""])[0])


def has_name(section: type[BaseModel], name: Any) -> bool:
    """Return whether `name` selects this section among others."""
    names = get_args(section.model_fields["name"].annotation)
    return name in names if names else is_import_path(name)


def _walk(model: type[BaseModel], prefix: str, variant: str | None) -> Iterator[Leaf]:
    for name, field in model.model_fields.items():
        path = prefix + name
        sections = sections_of(field.annotation)
        for section in sections:
            yield from _walk(section, f"{path}.", variant_name(section) if len(sections) > 1 else variant)
        if not sections:
            yield _leaf(path, field, variant)


def _leaf(path: str, field: FieldInfo, variant: str | None) -> Leaf:
    extra = field.json_schema_extra
    operational = isinstance(extra, dict) and bool(extra.get("operational"))
    return Leaf(path, field.annotation, field.default, field.description or "", operational, variant)


def table_around(path: str) -> Leaf | None:
    """Return the table that a dotted path is inside of, e.g. `model.options` for `model.options.width`, if any."""
    return next((leaf for leaf in leaves() if leaf.is_table and path.startswith(f"{leaf.path}.")), None)


@cache
def leaves() -> tuple[Leaf, ...]:
    """Return every setting; one that several variants of a section share appears once per variant."""
    return tuple(_walk(TrainConfig, "", None))
