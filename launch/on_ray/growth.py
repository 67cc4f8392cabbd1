"""Grows a run that has fewer workers than `num_workers`: requests nodes, and stops the attempt once more workers fit."""

import math
import time
from collections.abc import Collection
from contextlib import suppress

from ray.exceptions import RayError

from distributed.config import TrainConfig
from distributed.config.scaling import Scaling
from distributed.errors import InputError
from distributed.run.folder import RunFolder
from distributed.run.records import read_attempts
from launch.on_ray.capacity import REQUEST_SECONDS, capacity, request_nodes

GROWTH = "the driver, to resume on more workers"
"""The reason for a stop."""


class GrowthMonitor:
    """Checks from time to time whether a run on fewer workers than `num_workers` could have more."""

    def __init__(self, config: TrainConfig, scaling: Scaling, workers: int, excluded: Collection[str]) -> None:
        self._run, self._scaling, self._excluded = RunFolder(config.run_dir), scaling, excluded
        self._can_grow = workers < scaling.num_workers
        self._attempts_before = self._started_attempts()
        self._checked_at, self._had_capacity = time.monotonic(), False
        self._requested_at = -math.inf

    def request_nodes(self) -> None:
        """Request nodes for `num_workers` from the autoscaler, and renew the request from time to time."""
        if self._can_grow and time.monotonic() > self._requested_at + REQUEST_SECONDS:
            self._requested_at = time.monotonic()
            with suppress(RayError, RuntimeError):  # a hint, which is renewed
                request_nodes(self._scaling, self._scaling.num_workers)

    def withdraw_request(self) -> None:
        """Let the autoscaler remove idle nodes again."""
        if self._can_grow:
            with suppress(RayError, RuntimeError):
                request_nodes(self._scaling, 0)

    def stop_reason(self) -> str | None:
        """Return the reason to stop once two checks in a row found capacity.

        A single check is not enough: a dead node counts as free for a while, and so do resources that workers are about
        to claim.
        """
        if not self._can_grow or time.monotonic() - self._checked_at < self._scaling.resize_seconds:
            return None
        before = self._had_capacity
        self._checked_at = time.monotonic()
        has_started = self._started_attempts() > self._attempts_before
        self._had_capacity = has_started and self._fits_more()
        return GROWTH if before and self._had_capacity else None

    def _fits_more(self) -> bool:
        with suppress(RayError, RuntimeError):  # the head is away for a moment
            return capacity(self._scaling, self._excluded).now > 0
        return False

    def _started_attempts(self) -> int:
        with suppress(InputError):  # the file system is away for a moment
            return sum(line.event == "started" for line in read_attempts(self._run.attempts_file))
        return 0
