"""The import path of a network, and the options of its factory. Imports no torch."""

import difflib
import keyword
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator
from pydantic_core import PydanticCustomError

BUILT_IN = ("alexnet", "improved_alexnet", "cifar_alexnet", "cifar_alexnet_bn")
IMPORT_PATH = "package.module:factory"

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


def name_hint(name: Any) -> str:
    """Return advice on a name that is neither built in nor an import path: the one probably meant, or an example."""
    text = str(name)[: _MAX_BYTES + 1]
    if close := difflib.get_close_matches(text.lower(), BUILT_IN, n=1, cutoff=0.75):
        return f"did you mean {close[0]}?"
    module, separator, factory = text.partition("(")[0].rpartition(":" if ":" in text else ".")
    if separator and factory != "py":
        module = module.removeprefix("./").removesuffix(".py").replace("/", ".")
        if is_import_path(f"{module}:{factory}"):
            return f"did you mean {module}:{factory}?"
    return "e.g. torchvision.models:resnet18, or net:make for the function make in ./net.py"


def _valid_option_name(name: str) -> str:
    """Return the name of an option; refuse one that cannot be a keyword argument of the factory."""
    if name == "num_classes":
        raise _refused("is the number of classes of the data, which the factory gets anyway; remove it")
    return valid_argument_name(name, of="the factory")


def valid_argument_name(name: str, of: str = "the function") -> str:
    """Return the name of a keyword argument; refuse one that no function can have."""
    if name.isidentifier() and not keyword.iskeyword(name):
        return name
    raise _refused(f"should be the name of an argument of {of}")


def valid_option(value: Any, *, depth: int = 0) -> Any:
    """Return an option with the word none replaced by None, as in config files; refuse what such a file cannot hold."""
    if value is None or value == "none":
        return None
    if depth == _MAX_DEPTH and isinstance(value, list | tuple | dict):
        raise _refused(f"should not be nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict) and all(isinstance(name, str) and _is_text(name) for name in value):
        return {name: valid_option(item, depth=depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple) and not any(item is None for item in value):
        return [item if item == "none" else valid_option(item, depth=depth + 1) for item in value]
    is_number = type(value) in (int, float) and math.isfinite(value) and abs(value) < 2.0**63
    if type(value) is bool or is_number or (type(value) is str and _is_text(value)):
        return value
    raise _refused(
        "should be text, true, false, none, a finite number, or a list or table of these without none in lists"
    )


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _refused(reason: str) -> PydanticCustomError:
    return PydanticCustomError("option", "{reason}", {"reason": reason})


ImportPath = Annotated[str, BeforeValidator(_valid_import_path)]
Options = dict[Annotated[str, AfterValidator(_valid_option_name)], Annotated[Any, PlainValidator(valid_option)]]
