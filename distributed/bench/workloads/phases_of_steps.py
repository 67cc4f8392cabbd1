"""Training with this project, with the phases of each step measured on every rank."""

from distributed.bench.measure import StepClock
from distributed.bench.phases import EXCHANGES, WAITS, PhaseClock, typical_step
from distributed.bench.workloads import this_project
from distributed.host.cpu_quota import use_first_cpus


def run(clock: StepClock, *, arguments: list[str], cores: int) -> dict[str, float]:
    """Train until the measurement is complete, on the first `cores` cores. Return this rank's `StepTimes` in ms."""
    use_first_cpus(cores)
    phases = PhaseClock()
    for function in EXCHANGES:
        phases.watch(function, "exchange")
    for function in WAITS:
        phases.watch(function, "wait")
    clock.on_step = phases.end_step
    this_project.run(clock, arguments=arguments)
    return {name: 1000 * seconds for name, seconds in typical_step(phases.steps)._asdict().items()}
