"""The base class and field types of the config's sections. Imports no torch.

A setting made with `setting` defines the experiment: resuming a run with another value is refused. One made with
`operational` (e.g. paths, logging intervals) may change between attempts, because the curve does not depend on it.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, field_validator
from pydantic_core import PydanticCustomError

from distributed.files import home_path

_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 3500
"""Linux's limits, with room for the names that a run appends to its folder."""


def _valid_path(value: Any) -> Any:
    """Return the path with `~` expanded; refuse one that the system would reject later."""
    if not isinstance(value, str | Path):
        return value
    try:
        value = home_path(value) if str(value).startswith("~") else value
    except ValueError:
        raise PydanticCustomError("path", "should be a full path: the home folder is unknown here") from None
    try:
        name = str(value).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("path", "should be UTF-8 text") from None
    if not name or b"\0" in name:
        raise PydanticCustomError("path", "should be a path, without zero bytes; . is the current folder")
    if len(name) > _MAX_PATH_BYTES or any(len(step) > _MAX_NAME_BYTES for step in name.split(b"/")):
        raise PydanticCustomError(
            "path", f"should have at most {_MAX_NAME_BYTES} bytes per name and {_MAX_PATH_BYTES:,} in total"
        )
    return value


AnyPath = Annotated[Path, Strict(False), BeforeValidator(_valid_path)]
OptionalPath = Annotated[Path | None, Strict(False), BeforeValidator(_valid_path)]


def setting(default: Any, doc: str, **bounds: Any) -> Any:
    """Declare a setting that defines the experiment; `doc` is its line in --help."""
    return Field(default, description=doc, **bounds)


def operational(default: Any, doc: str, **bounds: Any) -> Any:
    """Declare a setting that may change when a run resumes; `doc` is its line in --help."""
    return Field(default, description=doc, json_schema_extra={"operational": True}, **bounds)


class Section(BaseModel):
    """A group of settings: frozen, with unknown keys forbidden."""

    # Strict, so that `epochs = true` does not mean 1.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*")
    @classmethod
    def _fits_64_bits(cls, value: Any) -> Any:
        if type(value) is int and value >= 2**63:
            raise PydanticCustomError("too_large", "should be less than 2**63")
        return value
