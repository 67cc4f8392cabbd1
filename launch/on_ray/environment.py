"""What Ray reads from the environment. Imports no ray: some of it is read when ray is imported."""

import os
import sys


def set_environment() -> None:
    """For this process, and for the workers that Ray starts for it. What the user has set stays.

    In the driver before ray is imported; once more where a trial of a sweep is the driver, in a process that Ray started.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines come once, from every rank; those alike are not folded
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no escape sequences in `ray job logs` and files
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # `ClusterStop` looks for drained nodes
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard lists runs
