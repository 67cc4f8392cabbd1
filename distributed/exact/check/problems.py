"""What exact mode does not support in a network, and the text that a user reads."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class Problem(NamedTuple):
    """What the module at `path` does, and the remedy."""

    path: str
    what: str
    remedy: str


def described(model: nn.Module, problems: Iterable[Problem]) -> list[str]:
    """Return one line for each kind of problem: the first module that has it, the number of others, and the remedy."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, *kind in problems:
        paths = groups.setdefault((kind[0], kind[1]), [])
        if path not in paths:
            paths.append(path)
    return [
        f"{paths[0] or 'the network'} ({type(model.get_submodule(paths[0])).__name__})"
        f"{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {what}; {remedy}"
        for (what, remedy), paths in groups.items()
    ]
