"""Training with this project, with the test accuracy and the training time after each epoch."""

from typing import Any

from distributed.bench.epoch_clock import EpochClock
from distributed.bench.measure import StepClock


def run(clock: StepClock, *, arguments: list[str]) -> dict[str, Any]:
    """Train as `python -m distributed.train ARGUMENTS` does, to the end. Return the curve; nothing on other ranks than 0."""
    from distributed.config import from_command_line
    from distributed.metrics.records import EpochMetrics, TrainMetrics
    from distributed.process import logs
    from distributed.recipe import train
    from distributed.topology import Topology

    epochs = EpochClock(clock.device)

    class Steps:
        """A stop source that never stops: the loop queries it after every step."""

        def requested(self) -> None:
            epochs.step()

    class Epochs:
        """A sink: the loop calls it before the first epoch and after each evaluation."""

        def begin(self, step: int) -> None:
            epochs.start()

        def log_step(self, metrics: TrainMetrics) -> None:
            pass

        def log_epoch(self, metrics: EpochMetrics) -> None:
            assert metrics.test is not None
            epochs.end_epoch(metrics.test.accuracy)
            epochs.start()

        def close(self) -> None:
            pass

    config = from_command_line(arguments).config
    logs.terminal_logs(Topology.from_environment().rank, level="WARNING")
    train(config, stop=Steps(), sinks=[Epochs()])
    return {"curve": epochs.curve} if epochs.curve else {}
