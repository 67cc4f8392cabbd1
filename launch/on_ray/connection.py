"""The connection of the driver to a Ray cluster."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from distributed.errors import InputError
from distributed.process import logs
from launch.environment import ray_address
from launch.on_ray.cluster import warn_if_open


@contextmanager
def connected(level: str) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; otherwise start one until the context ends.

    Args:
        level: of the log messages.

    Raises:
        InputError: RAY_ADDRESS is `auto`, and no Ray runs on this machine; or the Ray that runs cannot be joined, e.g.
            because its version differs.
    """
    logs.terminal_logs(0, level=level)
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, RuntimeError, RayError) as error:
        address = ray_address()
        raise InputError(
            f"{f'environment: RAY_ADDRESS = {address}' if address else 'the Ray on this machine'}: "
            f"{' '.join(str(error).split())[:400]}; start Ray (ray start) in this environment, or set RAY_ADDRESS=local to "
            "start a Ray for this run"
        ) from None
    try:
        warn_if_open()
        yield
    finally:
        ray.shutdown()
