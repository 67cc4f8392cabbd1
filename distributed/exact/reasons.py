"""Reasons why exact mode cannot train a network, and the text that a user reads."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class Reason(NamedTuple):
    """What a module does that exact mode does not support, and the remedy."""

    path: str
    layer: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where()}: {self.problem}; {self.remedy}"

    def where(self) -> str:
        """Return the module's path and class, e.g. `layer1.0.bn1 (BatchNorm2d)`."""
        return f"{self.path} ({self.layer})" if self.path else f"the network ({self.layer})"


class Paths:
    """The path of every module of a network, and reasons that name it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = {id(module): path for path, module in model.named_modules()}

    def of(self, module: nn.Module) -> str | None:
        """Return a module's path, or None if it is not registered in the network."""
        return self._paths.get(id(module))

    def reason(self, path: str, problem: str, remedy: str) -> Reason:
        """Return a reason that names the module at this path."""
        return Reason(path, type(self._model.get_submodule(path)).__name__, problem, remedy)


def grouped(reasons: Iterable[Reason]) -> list[str]:
    """Return one line for each problem: its first module, the number of others, and the remedy."""
    groups: dict[tuple[str, str], dict[str, Reason]] = {}
    for reason in reasons:
        groups.setdefault((reason.problem, reason.remedy), {}).setdefault(reason.path, reason)
    lines = []
    for group in groups.values():
        first, *others = group.values()
        more = f" and {len(others)} more" if others else ""
        lines.append(f"{first.where()}{more}: {first.problem}; {first.remedy}")
    return lines
