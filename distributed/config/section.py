"""What the sections of the tree are made of. Imports no torch.

A setting made with `setting` defines the experiment: a run resumed with another value is refused. One made with
`operational` may change between attempts (where things lie, how often they are logged), since the curve stays the same.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

AnyPath = Annotated[Path, Strict(False)]
OptionalPath = Annotated[Path | None, Strict(False)]


def setting(default: Any, doc: str, **bounds: Any) -> Any:
    return Field(default, description=doc, **bounds)


def operational(default: Any, doc: str, **bounds: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"operational": True}, **bounds)


class Section(BaseModel):
    # Strict, so that `epochs = true` is no way to write 1.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)
