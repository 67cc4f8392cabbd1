"""The connection of the driver to a Ray cluster."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray

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
        InputError: RAY_ADDRESS is `auto`, and no Ray runs on this machine.
    """
    logs.terminal_logs(0, level=level)
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True)
    except ConnectionError as error:
        raise InputError(
            f"environment: RAY_ADDRESS = {ray_address()}: {str(error).splitlines()[0]}; start Ray (ray start), or unset it to "
            "start a Ray for this run"
        ) from None
    try:
        warn_if_open()
        yield
    finally:
        ray.shutdown()
