"""What the sections of the tree are made of. Imports no torch.

A setting made with `setting` defines the experiment: a run resumed with another value is refused. One made with
`operational` may change between attempts (where things lie, how often they are logged), since the curve stays the same.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, field_validator
from pydantic_core import PydanticCustomError

from distributed.files import home_path

_LONGEST_NAME, _LONGEST_PATH = 255, 3500  # bytes; of Linux, with room for what a run puts behind


def _nameable(value: Any) -> Any:
    """A path that a file can have, so that nobody meets the system's refusal later; `~` is the home folder."""
    if not isinstance(value, str | Path):
        return value
    try:
        value = home_path(value) if str(value).startswith("~") else value
    except ValueError:
        raise PydanticCustomError("path", "should be a full path: the home folder is not known here") from None
    try:
        name = str(value).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("path", "should be UTF-8 text") from None
    if not name or b"\0" in name:
        raise PydanticCustomError("path", "should be a path, without zero bytes; . is the current folder")
    if len(name) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in name.split(b"/")):
        raise PydanticCustomError(
            "path", f"should have at most {_LONGEST_NAME} bytes a name and {_LONGEST_PATH:,} in all"
        )
    return value


AnyPath = Annotated[Path, Strict(False), BeforeValidator(_nameable)]
OptionalPath = Annotated[Path | None, Strict(False), BeforeValidator(_nameable)]


def setting(default: Any, doc: str, **bounds: Any) -> Any:
    return Field(default, description=doc, **bounds)


def operational(default: Any, doc: str, **bounds: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"operational": True}, **bounds)


class Section(BaseModel):
    # Strict, so that `epochs = true` is no way to write 1.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*")
    @classmethod
    def _fits_64_bits(cls, value: Any) -> Any:
        if type(value) is int and value >= 2**63:
            raise PydanticCustomError("too_large", "should be less than 2**63")
        return value
