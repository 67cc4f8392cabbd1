"""A sink that makes each step take half a second, for runs that must not end before they are killed."""

import time
from pathlib import Path

from distributed.config import TrainConfig
from distributed.metrics.records import EpochMetrics, TrainMetrics

SLOW = ("--logging.sinks", '["kit.slow_sink:Slow"]')
"""The arguments that add it to a run. Unlike many short steps, waiting takes no processor time from other tests."""


class Slow:
    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        pass

    def log_step(self, metrics: TrainMetrics) -> None:
        time.sleep(0.5)

    def log_epoch(self, metrics: EpochMetrics) -> None:
        pass

    def close(self) -> None:
        pass
