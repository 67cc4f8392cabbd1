"""Settings of functions by import path: the loss and the metrics of evaluations. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag
from pydantic_core import PydanticCustomError

from distributed.config.networks import ImportPath, Options, is_import_path
from distributed.config.schema import Section, setting

_MAX_METRICS = 50
_TAKEN = ("loss", "accuracy", "accuracy5")
"""Names of the metrics that every evaluation has."""

LOSS_NAMES = ("cross_entropy",)
LOSS_EXAMPLE = "e.g. net:loss for the function loss in ./net.py"


class Loss(Section):
    name: Literal["cross_entropy"] = setting("cross_entropy", "cross-entropy")
    label_smoothing: float = setting(
        0.0, "fraction of the target that is spread evenly over all classes (Szegedy et al. 2016)", ge=0, lt=1
    )


class ImportedLoss(Section):
    """A loss that a function outside this package computes."""

    name: ImportPath = setting(
        ..., "any other loss: function(logits, targets, **options) returns one loss per sample, e.g. net:loss",
        examples=["package.module:function"],
    )  # fmt: skip
    options: Options = setting({}, "further keyword arguments of the function: --loss.options.NAME VALUE")


def _loss_variant(section: Any) -> str | None:
    """Return the tag of the class that a loss section is read as; its name if none fits; None if it is no section."""
    if not isinstance(section, dict | Loss | ImportedLoss):
        return None
    name = section.get("name", "cross_entropy") if isinstance(section, dict) else section.name
    if name == "cross_entropy":
        return "built_in"
    return "imported" if is_import_path(name) else f"unknown name {name}"


AnyLoss = Annotated[
    Annotated[Loss, Tag("built_in")] | Annotated[ImportedLoss, Tag("imported")], Discriminator(_loss_variant)
]
"""The section `loss`: its name selects the class."""


def metric_name(path: str) -> str:
    """Return the name under which a metric is reported: that of its function."""
    return path.rpartition(":")[2].rpartition(".")[2]


def _valid_metrics(value: Any) -> tuple[str, ...]:
    """Return the import paths of metrics; refuse other values and names that occur twice."""
    if not isinstance(value, list | tuple) or not all(is_import_path(path) for path in value):
        raise PydanticCustomError(
            "metrics", 'should be a list of import paths, package.module:function, e.g. ["net:brier"]'
        )
    if len(value) > _MAX_METRICS:
        raise PydanticCustomError("metrics", f"should have at most {_MAX_METRICS} metrics")
    names = [metric_name(path) for path in value]
    for name in names:
        if name in _TAKEN:
            raise PydanticCustomError("metrics", f"{name} is measured anyway; rename the function, or remove it")
        if names.count(name) > 1:
            raise PydanticCustomError(
                "metrics", f"two metrics have the name {name}; rename one of the functions, or remove it"
            )
    return tuple(value)


Metrics = Annotated[tuple[str, ...], BeforeValidator(_valid_metrics)]
