"""Settings of the network. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from distributed.config.networks import ALEXNETS, BUILT_IN, FactoryOptions, ImportPath, is_import_path
from distributed.config.schema import Section, setting
from distributed.host.importable import check_module

_MAX_WIDTH = 4096


def _valid_widths(value: Any) -> tuple[int, int, int]:
    """Return three numbers of channels; refuse other values."""
    is_valid = isinstance(value, list | tuple) and len(value) == 3
    if is_valid and all(type(width) is int and 1 <= width <= _MAX_WIDTH for width in value):
        return tuple(value)
    raise PydanticCustomError(
        "widths", f"should be a list of three numbers from 1 to {_MAX_WIDTH}, e.g. [64, 256, 256]"
    )


class BuiltInModel(Section):
    """A network of this package."""

    name: str  # defined by the variants; here so that it is the first field

    @property
    def short_name(self) -> str:
        """The name in the default run folder."""
        return self.name

    @property
    def input_side(self) -> int | None:
        """Height and width in pixels that the network computes on; it resizes smaller images itself."""
        return 224 if self.name == "alexnet" else 32

    def check_importable(self) -> Path | None:
        """Return the file of its module: None, because it is a part of this package."""
        return None


class Model(BuiltInModel):
    """A variant of AlexNet from the reference implementations."""

    name: Literal["alexnet", "improved_alexnet", "cifar_alexnet", "cifar_alexnet_bn"] = setting(
        "improved_alexnet", "a network of this package"
    )
    init: Literal["torch", "he"] = setting(
        "torch", "initial weights; torch: uniform up to 1 / sqrt(fan_in), biases too; he: uniform up to sqrt(6 / fan_in), "
        "biases zero, for networks without batch norm"
    )  # fmt: skip
    dropout: float = setting(0.5, "dropout probability of the hidden linear layers", ge=0, lt=1)


class FastAlexNet(BuiltInModel):
    """A modern AlexNet: a plain stack of 3x3 convolutions with batch norm, and one linear layer."""

    name: Literal["fast_alexnet"] = setting("fast_alexnet", "seven convolutions with batch norm, one linear layer")
    widths: Annotated[tuple[int, int, int], BeforeValidator(_valid_widths)] = setting(
        (64, 256, 256), "channels of the three blocks of two convolutions"
    )
    whitening: bool = setting(
        True, "compute the first convolution's weights from the training images, so that its output is decorrelated, and "
        "keep them; false: train them"
    )  # fmt: skip
    activation: Literal["relu", "gelu"] = setting("relu", "activation function; gelu takes longer to compute")


class ImportedModel(Section):
    """A network that a function outside this package builds, with its own initial weights."""

    name: ImportPath = setting(
        ..., "any other network: factory(num_classes=N, **options), e.g. torchvision.models:resnet18",
        examples=["package.module:factory"],
    )  # fmt: skip
    input_side: int | None = setting(
        None, "height and width in pixels that the images are resized and cropped to, on the device; none: they keep their "
        "size; needed for image folders", ge=8, le=4096,
    )  # fmt: skip
    options: FactoryOptions = setting({}, "further keyword arguments of the factory: --model.options.NAME VALUE")

    @property
    def short_name(self) -> str:
        """The name in the default run folder."""
        return self.name.rpartition(":")[2]

    def check_importable(self) -> Path | None:
        """Return the file of its module if it is known; nothing is imported.

        Raises:
            InputError: there is no such module.
        """
        return check_module(self.name, "model.name")


def _model_variant(section: Any) -> str | None:
    """Return the tag of the class that a model section is read as; its name if none fits; None if it is no section."""
    if not isinstance(section, dict | BuiltInModel | ImportedModel):
        return None
    name = section.get("name", ALEXNETS[0]) if isinstance(section, dict) else section.name
    if name in BUILT_IN:
        return "alexnets" if name in ALEXNETS else "fast_alexnet"
    return "imported" if is_import_path(name) else f"unknown name {name}"


AnyModel = Annotated[
    Annotated[Model, Tag("alexnets")]
    | Annotated[FastAlexNet, Tag("fast_alexnet")]
    | Annotated[ImportedModel, Tag("imported")],
    Discriminator(_model_variant),
]
"""The section `model`: its name selects the class."""


def model_from(values: dict[str, Any]) -> BuiltInModel | ImportedModel:
    """Return the model section with these values, e.g. from an exported file's metadata.

    Raises:
        ValueError: they are not valid.
    """
    section: BuiltInModel | ImportedModel = TypeAdapter(AnyModel).validate_python(values)
    return section
