"""From argv to a checked `TrainConfig`, or to every mistake at once, a line each. Imports no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distributed.config.hints import hint, known
from distributed.config.layers import Settings, from_arguments, from_file, shown
from distributed.config.leaves import leaves, sections_of, variant_name
from distributed.config.named import config_file
from distributed.config.train_config import TrainConfig
from distributed.errors import InputError
from distributed.files import with_home

_NAMING = {"data", "data.name", "data.root", "data.download", "data.urls"}  # who sets one of them means that data set
_MOST_LINES = 20


def load(arguments: Sequence[str], *, default_data: str = "cifar10") -> tuple[TrainConfig, bool]:
    """The config that `[CONFIG] [--field value ...]` describes, and whether the images were named by the user.

    CONFIG is a TOML file or the name of a shipped config.

    Args:
        default_data: the data set where neither says one.

    Raises:
        InputError: every wrong field at once; conflicts between fields once each is valid by itself.
    """
    words = list(arguments)
    file = config_file(with_home(words.pop(0))) if words and not words[0].startswith("-") else None
    settings = Settings({"data": {"name": default_data}})
    if file:
        settings.override(from_file(file))
    settings.override(from_arguments(words))
    config = validated(settings)
    if "run_dir" not in settings.values:
        stem = file.stem if file else f"{config.model.name}-{config.data.name}"
        config = with_values(config, run_dir=Path("runs") / stem)
    return config, bool(file or _NAMING & settings.places.keys())


def validated(settings: Settings) -> TrainConfig:
    """The tree of these settings; every value that is wrong is one line of the `InputError`, up to twenty."""
    config, problems = _checked(_with_names(settings.values))
    if config and not settings.mistakes:
        return config
    if settings.mistakes:  # a setting that was not read may be why others do not go together
        problems = [problem for problem in problems if problem["type"] != "conflict"]
    lines = settings.mistakes[:_MOST_LINES]
    for problem in problems[: _MOST_LINES - len(lines)]:
        lines += _explained(problem, settings)
    more = len(settings.mistakes) + len(problems) - _MOST_LINES
    raise InputError(*lines, *([f"and {more:,} more mistake{'s' if more > 1 else ''}"] if more > 0 else []))


def _checked(values: dict[str, Any]) -> tuple[TrainConfig | None, list[ErrorDetails]]:
    """The tree, or every problem of the values."""
    try:
        return TrainConfig.model_validate(values), []
    except ValidationError as error:
        found = [problem for detail in error.errors(include_url=False) for problem in _of_each_key(detail)]
    wrong_names = [problem for problem in found if problem["type"] == "union_tag_invalid"]
    if not wrong_names:
        return None, found
    # Pydantic does not look into a section of an unknown name: look again under the name that fits best.
    sections = [str(problem["loc"][0]) for problem in wrong_names]
    _, others = _checked(values | {section: _named_likeliest(section, values[section]) for section in sections})
    return None, wrong_names + [
        problem
        for problem in others
        if problem["type"] != "conflict"
        and not (problem["type"] == "extra_forbidden" and _path(problem["loc"], values)[0] in known())
    ]


def _of_each_key(detail: ErrorDetails) -> Iterator[ErrorDetails]:
    """A problem for each setting in an unknown section; others as they are."""
    value = detail["input"]
    if detail["type"] != "extra_forbidden" or not isinstance(value, dict) or not value:
        yield detail
        return
    for key, item in value.items():
        yield from _of_each_key(cast(ErrorDetails, {**detail, "loc": (*detail["loc"], key), "input": item}))


def _named_likeliest(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A section under the name of the variant that has most of its settings."""
    field = TrainConfig.model_fields[section]
    variants = sections_of(field.annotation)
    best = max(
        variants, key=lambda variant: (len(values.keys() & variant.model_fields.keys()), variant is type(field.default))
    )
    return {**values, "name": variant_name(best).split(" | ")[0]}


def _with_names(values: dict[str, Any]) -> dict[str, Any]:
    """A section of several variants that does not say its name has the default's: `--schedule.start_factor 0` will do."""
    named = dict(values)
    for key, value in values.items():
        field = TrainConfig.model_fields.get(key)
        if field and isinstance(value, dict) and len(sections_of(field.annotation)) > 1:
            named[key] = {"name": field.default.name, **value}
    return named


def with_values(config: TrainConfig, **values: Any) -> TrainConfig:
    """A copy with some top-level values replaced, checked like any other."""
    return TrainConfig.model_validate({**dict(config), **values})


def as_toml(config: TrainConfig) -> str:
    """The resolved config as TOML that `load` reads back to an equal config."""
    return tomli_w.dumps(_without_none(config))


def toml_value(value: Any) -> str:
    """A setting's value as a config file spells it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"x": "none" if value is None else value}).removeprefix("x = ").strip()


def _without_none(section: BaseModel) -> dict[str, Any]:
    """TOML has no null: none is left out where it is the default, else it is the word."""
    tree: dict[str, Any] = {}
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            tree[name] = _without_none(value)
        elif value is not None or field.default is not None:
            tree[name] = "none" if value is None else plain[name]
    return tree


def differences(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every setting that differs; what auto stands for is for the run to compare."""
    flat_old, flat_new = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    paths = [*flat_old, *(path for path in flat_new if path not in flat_old)]
    found = [(p, flat_old.get(p), flat_new.get(p)) for p in paths if flat_old.get(p) != flat_new.get(p)]
    return [change for change in found if change[0] != "exact.shards" or "auto" not in change]


def changes_experiment(path: str, config: TrainConfig) -> bool:
    """Whether a run may not go on under another value of this setting."""
    if path == "epochs":  # lr over time depends on it only where a schedule is laid out over the whole run
        return config.schedule.name not in ("constant", "plateau")
    return not any(leaf.path == path and leaf.operational for leaf in leaves())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _explained(detail: ErrorDetails, settings: Settings) -> list[str]:
    """One pydantic error as lines `place: key = value: what is wrong; remedy`."""
    if detail["type"] == "conflict":
        return str(detail["msg"]).splitlines()
    path, tags = _path(detail["loc"], settings.values)
    value = detail["input"]
    if detail["type"] == "union_tag_invalid":
        path = f"{path}.name"
        value = value["name"] if isinstance(value, dict) else value
    inside = next((key for key in settings.places if key.startswith(f"{path}.")), "")
    place = next(
        (settings.places[key] for key in (path, inside, path.rpartition(".")[0]) if key in settings.places), "config"
    )
    given = f" = {shown(value)}" if not isinstance(value, dict) or value else ""
    return [f"{place}: {shown(path)}{given}: {_reason(detail, path, tags)}"]


def _path(location: tuple[int | str, ...], values: Any) -> tuple[str, list[str]]:
    """The dotted path of an error's place, without the tags that pydantic puts after a union's name; those apart."""
    path: list[str] = []
    tags: list[str] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(values, dict) and part not in values and not last:
            tags.append(str(part))
            continue
        path.append(str(part))
        values = values.get(part) if isinstance(values, dict) else None
    return ".".join(path), tags


def _reason(detail: ErrorDetails, path: str, tags: list[str]) -> str:
    if detail["type"] == "extra_forbidden":
        variants = sorted({leaf.variant for leaf in leaves() if leaf.path == path and leaf.variant})
        if variants and tags:
            section = path.rpartition(".")[0]
            return f"belongs to {section}.name = {' or '.join(variants)}, and here it is {', '.join(tags)}; remove one of them"
        if path in known():
            return "unknown setting; a dotted name stands without quotes"
        return f"unknown setting; {hint(path)}"
    if detail["type"] == "union_tag_invalid":
        options = [leaf.choices for leaf in leaves() if leaf.path == path]
        return f"should be one of {' | '.join(options)}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        example = next(leaf.path for leaf in leaves() if leaf.path.startswith(path.removesuffix("name")))
        return f"is a section; set its fields, as in --{example} VALUE"
    message = str(detail["msg"]).removeprefix("Input ").removeprefix("should ")
    return f"should {message[:1].lower()}{message[1:]}" if "should" in str(detail["msg"]) else message
