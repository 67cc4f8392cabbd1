"""Environment variables that configure Ray. Imports no ray: it reads some of them when it is imported."""

import os
import sys


def set_environment() -> None:
    """Set Ray's variables for this process and the workers that it starts; the user's own values stay if they can.

    Call it in the driver before importing ray, and again in each trial of a sweep: a trial is a driver in a process that
    Ray started.
    """
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # `driver` needs its ScalingConfig
    for name in ("RAY_AIR_LOCAL_CACHE_DIR", "TUNE_RESULT_DIR"):  # Tune refuses to run with these
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # every rank's lines appear, equal ones too
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no escape sequences in `ray job logs` and files
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # `ClusterStop` watches for draining nodes
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard lists runs
