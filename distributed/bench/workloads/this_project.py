"""Training with this project."""

from distributed.bench.measure import StepClock


def run(clock: StepClock, *, arguments: list[str]) -> None:
    """Train as `python -m distributed.train ARGUMENTS` does, until the measurement is complete."""
    from distributed.config import from_command_line
    from distributed.process import logs
    from distributed.recipe import train
    from distributed.topology import Topology

    class Stop:
        """A stop source that ticks the clock, since the loop queries it after every step."""

        def requested(self) -> str | None:
            return "the end of the measurement" if clock.tick() else None

    config = from_command_line(arguments).config
    logs.terminal_logs(Topology.from_environment().rank, level="WARNING")
    train(config, stop=Stop())
