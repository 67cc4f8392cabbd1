"""`python tests/exact_matrix.py`: exact mode's promises on all networks, once; writes results/exact_matrix.json.

Every network at 1 to 4 processes, in float32 and bfloat16, with replicated and sharded weights, with even, uneven and empty
shards, micro-batches and clipping; a run that is killed on 2 processes, stopped on 3 and finished on 4; fast mode in float64;
and peak memory of the backward pass. Takes under 15 minutes on two cores. Exit code 1 if anything differs.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.backward_memory import compared
from kit.commands import attempts
from kit.networks import CASES, NETWORKS, UNEVEN, Outcome, fast_deviation, network_config, run_epoch
from kit.ranks import RankFailed, in_group, run_ranks
from kit.traces import assert_same_run, traced

from distributed import recipe
from distributed.bench.machine import machine
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.metrics.records import EpochMetrics, TrainMetrics
from distributed.run.folder import RunFolder

PRECISIONS, ENGINES = ("float32", "bfloat16"), ("ddp", "fsdp")
WORLD_SIZES = (2, 3, 4, 1)
INTERRUPTED = {2: "fsdp", 3: "ddp", 4: "fsdp", 1: "ddp"}
"""World size -> engine. The run is killed on 2, stopped on 3 and finished on 4; the run on 1 is undisturbed."""
MOST_DEVIATION, MOST_MEMORY = 1e-12, 1.1
KILL_STEP = 3
OUT = Path(__file__).parents[1] / "results" / "exact_matrix.json"
Key = tuple[str, str, str]


@dataclass
class KillSelf:
    """A sink that kills this process, as kill -9 does, after the step `KILL_STEP`, on rank 1."""

    def log_step(self, metrics: TrainMetrics) -> None:
        if metrics.step >= KILL_STEP and collectives.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def log_epoch(self, metrics: EpochMetrics) -> None:
        pass

    def close(self) -> None:
        pass


def interrupted_config(network: str, folder: Path, precision: str) -> TrainConfig:
    size = collectives.world_size()
    name = "undisturbed" if size == 1 else "interrupted"
    return network_config(
        network,
        folder / f"{name}, {precision}",
        case=UNEVEN,
        precision=precision,
        engine={"name": INTERRUPTED[size]},
        epochs=2,
        checkpoint={"every_steps": 2},
    )


@in_group
def killed(network: str, folder: Path, precision: str) -> None:
    recipe.train(interrupted_config(network, folder, precision), sinks=[KillSelf()])


@in_group
def run_cases(network: str, folder: Path) -> tuple[dict[Key, Outcome], float | None]:
    """Run all cases on this number of processes; continue the interrupted run; return fast mode's deviation on 1 and 2."""
    size, outcomes = collectives.world_size(), {}
    for engine in ENGINES if size > 1 else ENGINES[:1]:
        for precision in PRECISIONS:
            for case in CASES:
                config = network_config(
                    network, Path("unused"), case=case, precision=precision, engine={"name": engine}
                )
                outcomes[engine, precision, case] = run_epoch(config)
    if size != 2:
        for precision in PRECISIONS:
            traced(interrupted_config(network, folder, precision), stop_after=1 if size == 3 else None)
    return outcomes, fast_deviation(network) if size <= 2 else None


def check_network(network: str, folder: Path) -> dict[str, Any]:
    """Run everything for one network; return what was found."""
    started, problems = time.monotonic(), list[str]()
    for precision in PRECISIONS:
        try:
            run_ranks(killed, 2, network, folder, precision, timeout_seconds=200)
            problems.append(f"killed run, {precision}: it was not killed")
        except RankFailed as failure:
            if "exit code -9" not in str(failure):
                problems.append(f"killed run, {precision}: {failure}")
    ranks: dict[int, list[tuple[dict[Key, Outcome], float | None]]] = {}
    for size in WORLD_SIZES:
        try:
            ranks[size] = run_ranks(run_cases, size, network, folder, timeout_seconds=500)
        except RankFailed as failure:
            problems.append(f"{size} processes: {failure}")
    equal = _compare_outcomes(ranks, problems) if 1 in ranks else 0
    deviations = {str(size): max(row[1] for row in ranks[size]) for size in (1, 2) if size in ranks}  # type: ignore[type-var]
    peaks = compared(network)
    memory = (peaks["pass"].backward - peaks["pass"].before) / (peaks["engine"].backward - peaks["engine"].before)
    if max(deviations.values(), default=0.0) > MOST_DEVIATION:
        problems.append(f"fast mode deviates by {deviations}")
    if memory > MOST_MEMORY:
        problems.append(f"the pass needs {memory:.2f} of the memory of torch's engine")
    return {
        "equal": equal,
        "expected_equal": len(ENGINES) * len(PRECISIONS) * len(CASES) * (len(WORLD_SIZES) - 1),
        "interrupted": {precision: _compare_runs(folder, precision, problems) for precision in PRECISIONS},
        "fast_deviation": deviations,
        "memory_ratio": round(memory, 3),
        "peak_mib": {how: peak._asdict() for how, peak in peaks.items()},
        "problems": problems,
        "seconds": round(time.monotonic() - started),
    }


def _compare_outcomes(ranks: dict[int, list[tuple[dict[Key, Outcome], float | None]]], problems: list[str]) -> int:
    """Return how many outcomes of several processes equal that of one on every rank."""
    alone, equal = ranks[1][0][0], 0
    for size, rows in ranks.items():
        for engine, precision, case in rows[0][0] if size > 1 else ():
            expected = alone["ddp", precision, case]
            if all(row[0][engine, precision, case] == expected for row in rows):
                equal += 1
            else:
                problems.append(f"other bits on {size} processes: {engine}, {precision}, {case}")
    return equal


def _compare_runs(folder: Path, precision: str, problems: list[str]) -> dict[str, Any]:
    """Compare an interrupted run with the undisturbed one; return where its attempts started."""
    run = folder / f"interrupted, {precision}"
    try:
        assert_same_run(RunFolder(run), RunFolder(folder / f"undisturbed, {precision}"))
        same = True
    except (AssertionError, OSError, IndexError) as error:
        problems.append(f"interrupted run, {precision}: {error}"[:500])
        same = False
    started = [{key: line[key] for key in ("world_size", "step")} for line in attempts(run, "started")]
    return {"equal": same, "attempts": started}


def row(network: str, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    interrupted = " ".join(
        f"{precision} {'equal' if run['equal'] else 'DIFFERENT'}" for precision, run in found["interrupted"].items()
    )
    fast = " ".join(f"{deviation:.0e}" for deviation in found["fast_deviation"].values())
    equal = f"{found['equal']}/{found['expected_equal']}"
    memory = f"{found['memory_ratio']:.2f}"
    return f"{network:20}{equal:>8}  {interrupted:32}{fast:14}{memory:>7}{found['seconds']:>6} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # of the ranks
    here = machine()
    started, load, found = time.monotonic(), os.getloadavg()[0], dict[str, dict[str, Any]]()
    print(f"{'network':20}{'equal':>8}  {'killed, stopped, resumed':32}{'fast, 1 and 2':14}{'memory':>7}")
    for network in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            found[network] = check_network(network, Path(folder))
        print(row(network, found[network]), *found[network]["problems"], sep="\n  ", flush=True)
        content = {
            "command": shlex.join(["python", "tests/exact_matrix.py", *sys.argv[1:]]),
            "machine": here,
            "load_at_start": round(load, 1),
            "seconds": round(time.monotonic() - started),
            "conditions": {
                "world_sizes": sorted(WORLD_SIZES),
                "precisions": PRECISIONS,
                "engines": ENGINES,
                "cases": CASES,
                "interrupted": "killed on 2 processes, stopped on 3, finished on 4; undisturbed on 1",
            },
            "networks": found,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(each["problems"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
