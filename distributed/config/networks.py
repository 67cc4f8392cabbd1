"""Import paths, and the options of the functions that they name. Imports no torch."""

import difflib
import keyword
import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator
from pydantic_core import PydanticCustomError

ALEXNETS = ("alexnet", "improved_alexnet", "cifar_alexnet", "cifar_alexnet_bn")
BUILT_IN = (*ALEXNETS, "fast_alexnet")
_EXAMPLE = "e.g. torchvision.models:resnet18, or net:make for the function make in ./net.py"

_MAX_BYTES = 200  # the default run folder is named after the factory
_MAX_DEPTH = 5  # of lists and tables in an option, so that a config file with it can be read


def is_import_path(name: Any) -> bool:
    """Return whether `name` has the syntax `package.module:factory`."""
    if not isinstance(name, str) or name.count(":") != 1 or ".py:" in name:
        return False
    if len(name.encode("utf-8", "replace")) > _MAX_BYTES:
        return False
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in name.replace(":", ".").split("."))


def _valid_import_path(name: Any) -> Any:
    """Return the import path; refuse any other value."""
    if is_import_path(name):
        return name
    raise PydanticCustomError("import_path", "should be an import path, {hint}", {"hint": name_hint(name)})


def name_hint(name: Any, known: Sequence[str] = BUILT_IN, example: str = _EXAMPLE) -> str:
    """Return advice on a name that is neither known nor an import path: the one probably meant, or an example."""
    text = str(name)[: _MAX_BYTES + 1]
    if close := difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.75):
        return f"did you mean {close[0]}?"
    module, separator, factory = text.partition("(")[0].rpartition(":" if ":" in text else ".")
    if separator and factory != "py":
        module = module.removeprefix("./").removesuffix(".py").replace("/", ".")
        if is_import_path(f"{module}:{factory}"):
            return f"did you mean {module}:{factory}?"
    return example


def _valid_option_name(name: str) -> str:
    """Return the name of an option; refuse one that cannot be a keyword argument."""
    if name.isidentifier() and not keyword.iskeyword(name):
        return name
    raise _refused("should be the name of an argument of the function")


def _not_num_classes(name: str) -> str:
    if name == "num_classes":
        raise _refused("is the number of classes of the data, which the factory gets anyway; remove it")
    return name


def _valid_option(value: Any, *, depth: int = 0) -> Any:
    """Return an option with the word none replaced by None, as in config files; refuse what such a file cannot hold."""
    if value is None or value == "none":
        return None
    if depth == _MAX_DEPTH and isinstance(value, list | tuple | dict):
        raise _refused(f"should not be nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict) and all(isinstance(name, str) and _is_text(name) for name in value):
        return {name: _valid_option(item, depth=depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple) and not any(item is None for item in value):
        return [item if item == "none" else _valid_option(item, depth=depth + 1) for item in value]
    is_number = (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))
    if type(value) is bool or is_number or (type(value) is str and _is_text(value)):
        return value
    raise _refused(
        "should be text, true, false, none, a finite number (integers below 2**63), or a list or table of these without none "
        "in lists"
    )


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _refused(reason: str) -> PydanticCustomError:
    return PydanticCustomError("option", "{reason}", {"reason": reason})


ImportPath = Annotated[str, BeforeValidator(_valid_import_path)]
_OptionName = Annotated[str, AfterValidator(_valid_option_name)]
_Option = Annotated[Any, PlainValidator(_valid_option)]
Options = dict[_OptionName, _Option]
FactoryOptions = dict[Annotated[_OptionName, AfterValidator(_not_num_classes)], _Option]
