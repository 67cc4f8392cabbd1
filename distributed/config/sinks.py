"""Settings of Weights & Biases, MLflow and sinks by import path. Imports no torch."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from distributed.config.networks import is_import_path
from distributed.config.schema import Section, operational

_SCHEMES = re.compile(r"https?|sqlite|(postgresql|mysql|mssql)(\+\w+)?|databricks(-uc)?")
_SECRET = re.compile(r"pass|secret|token|pwd", re.IGNORECASE)


def _name_for(service: str, forbidden: str = "", longest: int = 128) -> BeforeValidator:
    """Return a validator of a name: one line of text that the service accepts."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        is_name = isinstance(value, str) and value.strip() and value.isprintable() and len(value) <= longest
        if is_name and not set(value) & set(forbidden):
            return value
        without = f", without {' '.join(forbidden)}" if forbidden else ""
        raise PydanticCustomError(
            "service_name", f"should be a name of at most {longest} characters for {service}{without}"
        )

    return BeforeValidator(check)


def _tags(value: Any) -> Any:
    if isinstance(value, list | tuple) and all(map(_is_tag, value)) and len(set(value)) == len(value):
        return tuple(value)
    raise PydanticCustomError("tags", 'should be a list of different tags of 1 to 64 characters, e.g. ["baseline"]')


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 1 <= len(value) <= 64


def _tracking_uri(value: Any) -> Any:
    if value in (None, "databricks", "databricks-uc"):
        return value
    try:
        parts = urlsplit(value) if isinstance(value, str) and value.isprintable() and " " not in value else None
    except ValueError:
        parts = None
    if parts and parts.scheme in ("", "file"):
        raise PydanticCustomError(
            "tracking_uri",
            "is a folder, which MLflow no longer writes to; name a database in it, e.g. sqlite:////FOLDER/mlflow.db",
        )
    if (
        parts is None
        or not _SCHEMES.fullmatch(parts.scheme)
        or (parts.scheme.startswith("http") and not parts.hostname)
    ):
        raise PydanticCustomError(
            "tracking_uri",
            "should be the address of a server or a database, e.g. https://HOST:5000 or sqlite:///mlflow.db",
        )
    if (
        parts.password is not None
        or (parts.username and parts.scheme.startswith("http"))
        or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query))
    ):
        remedy = (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            if parts.scheme.startswith("http")
            else "remove the setting and set MLFLOW_TRACKING_URI instead"
        )
        raise PydanticCustomError(
            "tracking_uri", f"has a password or a token, which the run folder would show; {remedy}"
        )
    return value


def _sink_paths(value: Any) -> Any:
    if (
        isinstance(value, list | tuple)
        and all(is_import_path(path) for path in value)
        and len(set(value)) == len(value)
    ):
        return tuple(value)
    raise PydanticCustomError(
        "sinks", 'should be a list of different import paths package.module:Class, e.g. ["my_sinks:Slack"]'
    )


SinkPaths = Annotated[tuple[str, ...], BeforeValidator(_sink_paths)]


class Wandb(Section):
    """Weights & Biases. The API key is read from WANDB_API_KEY or from what `wandb login` stored, never from the config."""

    project: Annotated[str, _name_for("a project", "/\\#?%:")] = operational("distributed-alexnet", "project")
    entity: Annotated[str | None, _name_for("an entity", "/\\#?%:")] = operational(
        None, "user or team; none: the account's default"
    )
    name: Annotated[str | None, _name_for("a run")] = operational(None, "name of the run; none: that of the run folder")
    tags: Annotated[tuple[str, ...], BeforeValidator(_tags)] = operational((), "tags of the run")
    mode: Literal["online", "offline"] = operational(
        "online", "offline: write to RUN/wandb only, for `wandb sync` later; online: send to the server too"
    )


class Mlflow(Section):
    """MLflow. User and password are read from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, never from the config."""

    tracking_uri: Annotated[str | None, BeforeValidator(_tracking_uri)] = operational(
        None, "server or database, e.g. https://HOST:5000 or sqlite:///mlflow.db; none: MLFLOW_TRACKING_URI"
    )
    experiment: Annotated[str, _name_for("an experiment", longest=250)] = operational(
        "distributed-alexnet", "experiment; created if it does not exist"
    )
    name: Annotated[str | None, _name_for("a run", longest=250)] = operational(
        None, "name of the run; none: that of the run folder"
    )

    @property
    def relative_database(self) -> str:
        """The path of an SQLite database that depends on the current folder; empty if there is none."""
        scheme, _, path = (self.tracking_uri or "").partition(":///")
        return path if scheme == "sqlite" and not path.startswith("/") else ""
