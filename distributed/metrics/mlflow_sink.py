"""Logs to MLflow: a server, or a database without a server."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.config.sinks import Mlflow
from distributed.errors import without_password
from distributed.metrics.follower import Logged, RefusedError, Status, values_of
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import MetricsRecord

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_TAG = "distributed.run"  # holds the run's identity, by which a later attempt finds it
_WAIT_SECONDS = 10
_MOST_METRICS, _MOST_PARAMETERS = 1000, 100  # that a server takes in one call
_LONGEST_NAME = 250  # of a run, in its database
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


class MlflowService:
    """A `Service`: one MLflow run, found again by a tag.

    The client is used directly, without MLflow's notion of an active run, which is global to the process.

    Args:
        identity: the same in all attempts at the run.
        parameters: settings by dotted name. MLflow keeps the first value of each.
    """

    def __init__(
        self, config: Mlflow, run_dir: Path, *, identity: str, parameters: Mapping[str, str | int | float | bool]
    ) -> None:
        self._config, self._identity = config, identity
        self._name = config.name or RunFolder(run_dir).name[-_LONGEST_NAME:]
        self._parameters = {_NOT_IN_NAMES.sub("_", name): str(value) for name, value in parameters.items()}
        self._client: Any = None
        self._run_id = ""
        self._time = 0

    def start(self) -> Logged:
        with _refusals():
            self._client = _client(self._config.tracking_uri)
            experiment = self._experiment()
            run = self._find(experiment) or self._client.create_run(
                experiment, run_name=self._name, tags={_TAG: self._identity}
            )
            self._run_id = run.info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            self._log_parameters(run.data.params)
            uri = without_password(str(self._client.tracking_uri))
            logger.info("MLflow: run {} ({}) in {}", self._name, self._run_id, uri)
            steps, epochs = self._history("train/lr"), self._history("epoch")
            return Logged(max((m.step for m in steps), default=0), int(max((m.value for m in epochs), default=0)))

    def log(self, records: Sequence[MetricsRecord]) -> None:
        from mlflow.entities import Metric

        # The same in every retry: the server drops what it has already stored, after its answer came too late.
        now = self._time = self._time or int(time.time() * 1000)
        metrics = [
            Metric(_NOT_IN_NAMES.sub("_", name), value, now, record.step)
            for record in records
            for name, value in values_of(record).items()
        ]
        with _refusals():
            for start in range(0, len(metrics), _MOST_METRICS):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + _MOST_METRICS])
        self._time = 0

    def finish(self, status: Status) -> None:
        with _refusals():
            self._client.set_tag(self._run_id, "distributed.status", status)
            self._client.set_terminated(self._run_id, _STATUS[status])

    def _experiment(self) -> str:
        """Return the id of the experiment, which another run may be creating at this moment."""
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(self._config.experiment):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(self._config.experiment))
        except MlflowException:
            if found := self._client.get_experiment_by_name(self._config.experiment):
                return str(found.experiment_id)
            raise

    def _find(self, experiment: str) -> Any:
        """Return the run of an earlier attempt, or None."""
        found = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{self._identity}'", max_results=1)
        return found[0] if found else None

    def _log_parameters(self, known: Mapping[str, str]) -> None:
        """Log what is not known yet. An operational setting may have changed since; MLflow refuses another value."""
        from mlflow.entities import Param

        new = [Param(name, value[:500]) for name, value in self._parameters.items() if name not in known]
        for start in range(0, len(new), _MOST_PARAMETERS):
            self._client.log_batch(self._run_id, params=new[start : start + _MOST_PARAMETERS])

    def _history(self, name: str) -> list[Any]:
        return list(self._client.get_metric_history(self._run_id, name))


def _client(uri: str | None) -> Any:
    """Return a client whose calls give up soon, so that an outage is noticed; they are repeated by the caller."""
    from mlflow import environment_variables
    from mlflow.tracking import MlflowClient

    settings: Any = environment_variables
    for variable, value in (
        (settings.MLFLOW_HTTP_REQUEST_TIMEOUT, _WAIT_SECONDS),
        (settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0),  # urllib3 would log a warning for each
        (settings.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
    ):
        if not variable.is_set():
            variable.set(value)
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn an error that would occur again, e.g. a wrong password, into a RefusedError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        untyped: Any = error
        code = int(untyped.get_http_status_code())
        if 400 <= code < 500 and code not in (408, 429):
            raise RefusedError(f"{str(error).splitlines()[0]}; continuing without it") from error
        raise
