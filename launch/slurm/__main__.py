"""`python -m launch.slurm CONFIG.toml [OPTIONS] [--SETTING VALUE ...]`: check a run against what it asks of Slurm, submit it.

What can be wrong is told now, not after hours in the queue. All words that are no option here are the training's.
Imports no torch.
"""

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distributed.errors import ExitCode, InputError
from distributed.files import replace_text
from distributed.host.shipped import shipped
from distributed.process.streams import run_command
from distributed.topology import Topology
from distributed.train import checked_config
from launch.environment import names_environment
from launch.slurm.plan import check_batch
from launch.sweep_arguments import with_folder

_FOR_SBATCH = ("partition", "time", "account", "qos", "constraint", "mem", "cpus_per_task", "job_name")


def parser() -> argparse.ArgumentParser:
    """Options of this command; sbatch's own keep their names."""
    options = argparse.ArgumentParser(
        prog="python -m launch.slurm CONFIG.toml", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_argument("--nodes", type=_count, default=1)
    options.add_argument("--gpus-per-node", type=_count, default=0, help="and as many processes; without: CPUs")
    options.add_argument("--ranks-per-node", type=_count, default=0, help="processes a node, where not one a GPU")
    for name in _FOR_SBATCH:
        options.add_argument(f"--{name.replace('_', '-')}", default="", help="as sbatch has it")
    options.add_argument("--sbatch", action="append", default=[], metavar="=OPTION", help="any other option of sbatch")
    options.add_argument("--seeds", type=_count, default=0, help="train with seeds 0 to N - 1, then mean and deviation")
    options.add_argument(
        "--sweep", action="append", default=[], metavar="SETTING=A,B", help="a run for each value; several: each pair"
    )
    options.add_argument("--at-once", type=_count, default=0, help="tasks of an array that run at the same time")
    options.add_argument("--max-requeues", type=int, default=20, help="how often the job requeues itself")
    options.add_argument("--dry-run", action="store_true", help="check and print, submit nothing")
    return options


def main() -> int:
    """0: submitted, or printed; 2: bad input; else what sbatch says."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        parser().print_help()
        return ExitCode.FINISHED if words else ExitCode.BAD_INPUT
    given, settings = parser().parse_known_args(words[1:])
    try:
        if words[0].startswith("-"):
            raise InputError(f"command line: {words[0]!r}: the first word names the config, e.g. cifar10")
        trainings = tasks([words[0], *settings], seeds=given.seeds, sweep=given.sweep)
        ranks = given.ranks_per_node or given.gpus_per_node or 1
        for training in trainings:
            check(training, world_size=given.nodes * ranks, gpus=given.gpus_per_node)
        is_array = bool(given.seeds or given.sweep)
        file = sweep_file([words[0], *settings]) if is_array else None
        command = sbatch_command(given, f"@{file}" if file else None, trainings)
        if file and not given.dry_run:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, "".join(shlex.join(training) + "\n" for training in trainings))
    except InputError as error:
        error.report()
        return ExitCode.BAD_INPUT
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; give another --run_dir", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if is_array:
        print(*(f"task {index}: {shlex.join(training)}" for index, training in enumerate(trainings)), sep="\n")
    print(shlex.join(command), flush=True)
    return ExitCode.FINISHED if given.dry_run else submit(command)


def tasks(words: Sequence[str], *, seeds: int, sweep: Sequence[str]) -> list[list[str]]:
    """The arguments of each training: one, or each combination of the sweep's values with each seed.

    Raises:
        InputError: a sweep that is no SETTING=A,B.
    """
    choices = []
    for one in sweep:
        name, equals, values = one.partition("=")
        if not (re.fullmatch(r"[\w.]+", name) and equals and values):
            raise InputError(f"--sweep {one}: should be SETTING=VALUE,VALUE, as optim.lr=0.1,0.05")
        choices.append([(name, value) for value in values.split(",")])
    if seeds:
        choices.append([("seed", str(seed)) for seed in range(seeds)])
    trainings = []
    for combination in itertools.product(*choices):
        folder = "/".join(f"{name}={value}" if name != "seed" else f"seed-{value}" for name, value in combination)
        more = [word for name, value in combination for word in (f"--{name}", value)]
        trainings.append(with_folder(words, folder, *more) if combination else list(words))
    return trainings


def check(training: Sequence[str], *, world_size: int, gpus: int) -> None:
    """Raises InputError where this training could not run on that many processes: told before it is in the queue."""
    config, finished = checked_config(training, Topology(world_size=world_size))
    if finished:
        raise InputError(f"run_dir = {config.run_dir}: this run is finished; give another with --run_dir")
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise InputError("device = cuda, and no GPUs are asked for; add --gpus-per-node N, or --device cpu")
    config.check_world_size(world_size, device)
    check_batch(config, world_size)
    run_dir = config.run_dir.absolute()
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"run_dir = {config.run_dir}: {there} cannot be written; give another with --run_dir")


def sweep_file(words: Sequence[str]) -> Path:
    """Where an array's trainings are listed: beside their folders."""
    return Path(with_folder(words, "sweep.txt")[-1]).absolute()


def sbatch_command(given: argparse.Namespace, listed: str | None, trainings: Sequence[Sequence[str]]) -> list[str]:
    """The call of sbatch as a user would type it."""
    command = ["sbatch", f"--nodes={given.nodes}"]
    if given.gpus_per_node:
        command.append(f"--gpus-per-node={given.gpus_per_node}")
    for name in _FOR_SBATCH:
        if value := getattr(given, name):
            command.append(f"--{name.replace('_', '-')}={value}")
    if listed:
        at_once = f"%{given.at_once}" if given.at_once else ""
        command.append(f"--array=0-{len(trainings) - 1}{at_once}")
    script = shipped("slurm/train.sh")
    exported = ["ALL", f"MAX_REQUEUES={given.max_requeues}", *_venv(script.parents[1])]
    if given.ranks_per_node:
        exported.append(f"RANKS_PER_NODE={given.ranks_per_node}")
    command += [*given.sbatch, f"--export={','.join(exported)}", str(script)]
    return command + ([listed] if listed else list(trainings[0]))


def _venv(project: Path) -> list[str]:
    """`VENV=FOLDER` of this Python, unless the script finds an environment by itself; a comma would end it in --export."""
    venv = Path(sys.prefix)
    found = names_environment() or (project / ".venv" / "bin" / "activate").is_file()
    return [] if found or "," in str(venv) or not (venv / "bin" / "activate").is_file() else [f"VENV={venv}"]


def submit(command: Sequence[str]) -> int:
    """sbatch's own exit code and words."""
    try:
        return subprocess.run(command, check=False).returncode
    except OSError:
        print("error: sbatch: not found here; run this on the cluster's login node, or give --dry-run", file=sys.stderr)
        return ExitCode.BAD_INPUT


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: should be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    run_command(main)
