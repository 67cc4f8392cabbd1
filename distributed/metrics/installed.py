"""Checks that what a run logs with is installed, before torch is imported."""

from distributed.config.sections import Logging
from distributed.host.importable import check_module
from distributed.host.versions import require


def check_installed(logging: Logging) -> None:
    """Check, without importing them, the packages and modules that rank 0 logs with.

    Raises:
        InputError: one is missing or too old.
    """
    if logging.wandb:
        require("wandb", at_least=(0, 31), needed_by="logging.wandb")
    if mlflow := logging.mlflow:
        require("mlflow-skinny", at_least=(3, 1), needed_by="logging.mlflow")
        if mlflow.tracking_uri and not mlflow.tracking_uri.startswith(("http", "databricks")):
            require("sqlalchemy", at_least=(2, 0), needed_by=f"logging.mlflow.tracking_uri = {mlflow.tracking_uri}")
    for path in logging.sinks:
        check_module(path, "logging.sinks")
