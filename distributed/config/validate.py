"""Validates settings, and reports all mistakes in them together. Imports no torch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distributed.config.hints import known
from distributed.config.layers import Settings
from distributed.config.leaves import sections_of, variant_name
from distributed.config.messages import dotted_path, explain
from distributed.config.train_config import TrainConfig
from distributed.errors import InputError, counted

_MAX_LINES = 20


def validated(settings: Settings) -> TrainConfig:
    """Return the config with these settings.

    Raises:
        InputError: one line per invalid value, at most twenty.
    """
    settings = replace(settings, values=_with_names(settings.values))
    config, problems = _checked(settings.values)
    if config and not settings.mistakes:
        return config
    if settings.mistakes:  # a setting that was not read may have caused the conflict
        problems = [problem for problem in problems if problem["type"] != "conflict"]
    lines = settings.mistakes[:_MAX_LINES]
    for problem in problems[: _MAX_LINES - len(lines)]:
        lines += explain(problem, settings)
    more = len(settings.mistakes) + len(problems) - _MAX_LINES
    raise InputError(*lines, *([f"and {counted(more, 'more mistake')}"] if more > 0 else []))


def _checked(values: dict[str, Any]) -> tuple[TrainConfig | None, list[ErrorDetails]]:
    """Return the config, or every problem of the values."""
    try:
        return TrainConfig.model_validate(values), []
    except ValidationError as error:
        found = [problem for detail in error.errors(include_url=False) for problem in _for_each_key(detail)]
    wrong_names = [problem for problem in found if problem["type"] == "union_tag_invalid"]
    if not wrong_names:
        return None, found
    # Pydantic does not look into a section with an unknown name: check again under the name that fits best.
    sections = [str(problem["loc"][0]) for problem in wrong_names]
    _, others = _checked(values | {section: _under_best_name(section, values[section]) for section in sections})
    return None, wrong_names + [
        problem
        for problem in others
        if problem["type"] != "conflict"
        and not (problem["type"] == "extra_forbidden" and dotted_path(problem["loc"], values)[0] in known())
    ]


def _for_each_key(detail: ErrorDetails) -> Iterator[ErrorDetails]:
    """Yield one problem per setting of an unknown section; other problems unchanged."""
    value = detail["input"]
    if detail["type"] != "extra_forbidden" or not isinstance(value, dict) or not value:
        yield detail
        return
    for key, item in value.items():
        yield from _for_each_key(cast(ErrorDetails, {**detail, "loc": (*detail["loc"], key), "input": item}))


def _under_best_name(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return a section under the name of the variant that has most of its settings."""
    field = TrainConfig.model_fields[section]
    best = max(
        sections_of(field.annotation),
        key=lambda variant: (len(values.keys() & variant.model_fields.keys()), variant is type(field.default)),
    )
    return {**values, "name": variant_name(best).split(" | ")[0]}


def _with_names(values: dict[str, Any]) -> dict[str, Any]:
    """Add the default name to sections with variants but no name, so that `--schedule.start_factor 0` is enough."""
    named = dict(values)
    for key, value in values.items():
        field = TrainConfig.model_fields.get(key)
        if field and isinstance(value, dict) and len(sections_of(field.annotation)) > 1:
            named[key] = {"name": field.default.name, **value}
    return named
