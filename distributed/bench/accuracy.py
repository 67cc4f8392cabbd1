"""`bench accuracy`: seconds of training until the test accuracy reaches 80, 90 and 94 %, of this project and of timm.

Both train the same network with the settings of one config. Their runs alternate, seed by seed, and each finished run is
written at once: the same command continues after an interruption.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from distributed.bench.accuracy_results import FINAL, SIDES, Results, Run, Spread, summary
from distributed.bench.machine import machine
from distributed.bench.options import Options
from distributed.bench.peers import peer_python
from distributed.bench.timm_settings import check, differences
from distributed.bench.training_speed import MODULES
from distributed.bench.workload import Workload, WorkloadFailedError
from distributed.config import TrainConfig, from_command_line
from distributed.config.data import CifarData
from distributed.data.sources import registry
from distributed.documents.markdown import listed, paragraph, table
from distributed.errors import ExitCode, counted
from distributed.host.versions import git_state
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.output_file import check_writable

CONFIG, SEEDS = "cifar10_fast", (0, 1, 2)
_NOT_IN_RESULTS = ("run_dir", "seed", "device", "threads", "timeout_seconds", "logging", "checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this benchmark has."""
    group = parser.add_argument_group("accuracy")
    group.add_argument("--config", metavar="FILE", help=f"a config's file or name; default: {CONFIG}")
    group.add_argument("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}")
    group.add_argument(
        "--processes",
        type=int,
        help="of this project; default: 2 of one thread; on CUDA 1, with --no-peers one per GPU",
    )
    group.add_argument("--epochs", type=int, help="epochs of each run; default: the config's")


def measure(arguments: argparse.Namespace, options: Options) -> ExitCode:
    """Run what is not finished yet, print a table of means over the seeds, and write everything as JSON on request.

    Raises:
        InputError: a setting or the data cannot be used, or the JSON file has other runs.
    """
    settings = _settings(arguments, options)
    config = from_command_line(settings).config
    config.check_world_size(options.processes, options.device)
    registry.prepare(config.data)
    if options.peers:
        check(config)
        options = replace(options, peer_python=peer_python(options.peers, ["timm"]))
    results = Results(
        _command(arguments, options),
        machine(options.device, peer_python=options.peer_python),
        _recorded(config) | {"processes": options.processes},
        differences(config) if options.peers else [],
    )
    file: Path | None = arguments.json
    if file:
        check_writable("--json", file)
        results.resume(file)
    deadline = time.monotonic() + 60 * arguments.minutes
    for seed in arguments.seeds or SEEDS:
        for side in SIDES if options.peers else SIDES[:1]:
            if not results.has(side, seed):
                _add_run(results, side, seed, [*settings, "--seed", str(seed)], options, deadline)
                if file:
                    with OptionalOutput(file):  # runs take long: a failed write must not end the benchmark
                        results.write(file)
    print(report(results.runs))
    print(*results.differences, sep="\n")
    if file:
        with requested_output("--json", file):
            results.write(file)
    return ExitCode.FAILED if results.failed else ExitCode.FINISHED


def report(runs: list[Run]) -> str:
    """Return the table of means and deviations over the seeds, and the commits if there are several."""
    spreads = summary(runs)
    names = list(dict.fromkeys(name for found in spreads.values() for name in found))
    rows = [[name, *(shown(spreads[side][name], name) for side in spreads)] for name in names]
    parts = [table(["", *(f"{side}, {counted(found[FINAL].seeds, 'seed')}" for side, found in spreads.items())], rows)]
    commits = list(dict.fromkeys(run.git or "unknown" for run in runs))
    if len(commits) > 1:
        parts.append(paragraph(f"The runs are of several commits: {listed(commits)}."))
    return "\n\n".join(parts)


def shown(spread: Spread, name: str) -> str:
    """Return a spread of the figure `name` as text, e.g. `61.0 ± 0.4`."""
    if spread.mean is None:
        return "not reached"
    digits, factor, unit = (2, 100, " %") if name == FINAL else (1, 1, "")
    deviation = "" if spread.deviation is None else f" ± {factor * spread.deviation:.{digits}f}"
    some = "" if spread.found == spread.seeds else f" ({spread.found} of {counted(spread.seeds, 'seed')})"
    return f"{factor * spread.mean:.{digits}f}{deviation}{unit}{some}"


def _add_run(results: Results, side: str, seed: int, settings: list[str], options: Options, deadline: float) -> None:
    """Train once, and add the run or its failure to the results."""
    start, name, git = time.monotonic(), f"{side}, seed {seed}", git_state()
    try:
        with tempfile.TemporaryDirectory() as folder:
            workload = _workload(side, [*settings, "--run_dir", f"{folder}/run"], options)
            measured = workload.measure_until(deadline, options.seconds)
        run = Run.of(seed, side, time.strftime("%Y-%m-%d"), measured.figures[0]["curve"], git)
    except WorkloadFailedError as error:
        results.failed[name] = str(error)
        results.outputs += f"{name}: {error}\n{error.output}\n\n"
        print(f"failed: {name}: {error}", file=sys.stderr, flush=True)
        return
    results.runs.append(run)
    reached = ", ".join(f"{percent} %: {_seconds(value)}" for percent, value in run.seconds_to.items())
    print(f"{name}: {reached}; {run.accuracy:.2%} after {run.seconds:.1f} s of training "
          f"({time.monotonic() - start:.0f} s in all)", file=sys.stderr, flush=True)  # fmt: skip


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f} s"


def _workload(side: str, settings: list[str], options: Options) -> Workload:
    """Return a training to its end: of this project, or of timm in one process."""
    if side == "timm":
        arguments = {"arguments": settings, "threads": options.threads, "workers": options.workers}
        return Workload(f"{MODULES}.timm_training:run", arguments, 1, options.device, python=options.peer_python)
    ranks = options.processes if options.processes > 1 else 0
    own = ["--logging.tensorboard", "false"]
    if options.threads:  # as many as timm has, over all processes
        own += ["--threads", str(max(1, options.threads // options.processes))]
    return Workload(f"{MODULES}.training_curve:run", {"arguments": [*settings, *own]}, 1, options.device, ranks=ranks)


def _settings(arguments: argparse.Namespace, options: Options) -> list[str]:
    """Return the command line of every run, but for its seed and folder."""
    found = [arguments.config or CONFIG, "--device", options.device, "--evaluation.test_every_epoch", "true"]
    found += ["--epochs", str(arguments.epochs)] if arguments.epochs is not None else []
    config = from_command_line(found).config
    found += ["--data.root", str(options.root)] if isinstance(config.data, CifarData) else []
    if config.precision == "auto":  # timm's side has no auto
        import torch

        from distributed.training.precision import fast_precision

        found += ["--precision", fast_precision(torch.device(options.device))]
    return found


def _recorded(config: TrainConfig) -> dict[str, object]:
    """Return the settings to which the results belong, as JSON."""
    values = {name: value for name, value in config.model_dump(mode="json").items() if name not in _NOT_IN_RESULTS}
    values["data"] = {name: value for name, value in values["data"].items() if name not in ("root", "placement")}
    found: dict[str, object] = json.loads(json.dumps(values))
    return found


def _command(arguments: argparse.Namespace, options: Options) -> str:
    """Return the command that repeats this measurement, without --data.root and time limits."""
    words = ["python -m distributed.bench accuracy", "--device", options.device, "--config", arguments.config or CONFIG]
    words += ["--seeds", *(arguments.seeds or SEEDS)]
    words += ["--processes", options.processes]
    words += ["--epochs", arguments.epochs] if arguments.epochs is not None else []
    return " ".join(map(str, words if options.peers else [*words, "--no-peers"]))
