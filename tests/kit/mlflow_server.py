"""A real MLflow server with its database in a file, ended by pid."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from distributed.gpu_check.processes import free_port
from kit.commands import children_of, kill
from kit.speed import slowness


class MlflowServer:
    """`mlflow server` on a free port of this machine, started with its context."""

    def __init__(self, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the same port and database as before, and wait until it answers."""
        arguments = (
            "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--default-artifact-root",
            str(self._folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
        )  # fmt: skip
        with (self._folder / "server.out").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments], stdout=output, stderr=output, cwd=self._folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        deadline = time.monotonic() + 120 * slowness()
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.out").read_text()[-3000:]
            assert time.monotonic() < deadline, "the MLflow server does not answer"
            time.sleep(0.2)

    def kill(self) -> None:
        """End it and what it started, at once."""
        below = [self._process.pid]
        for pid in below:
            below += children_of(pid)
        kill(*below)
        self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def _runs(uri: str, experiment: str) -> tuple[Any, list[Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return client, client.search_runs([found.experiment_id]) if found else []


def only_run(uri: str, experiment: str) -> Any:
    """Return the only run of the experiment."""
    _, (run,) = _runs(uri, experiment)
    return run


def history(uri: str, experiment: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric in all runs of the experiment, in the order of steps."""
    client, runs = _runs(uri, experiment)
    points = [point for run in runs for point in client.get_metric_history(run.info.run_id, name)]
    return sorted((point.step, point.value) for point in points)
