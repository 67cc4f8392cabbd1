"""`python -m launch.slurm CONFIG.toml [OPTIONS] [--SETTING VALUE ...]`: checks a run and its resources, then submits it.

Errors are reported now instead of after hours in the queue. Every argument that is not an option below is a setting of the run,
as for `python -m distributed.train`.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from distributed.config import from_command_line
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.host.shipped import shipped
from distributed.process.arguments import OneLineParser
from distributed.process.streams import run_command
from distributed.topology import Topology
from distributed.train import checked_config
from launch.environment import names_environment, ranks_per_node
from launch.slurm.plan import check_batch
from launch.slurm.task import indices
from launch.sweep import Sweep, Trial, check_compared, check_trials, trial_arguments, trials_of
from launch.sweep_arguments import read_sweep, split_sweep

_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables that say which cluster to use; all others of this prefix belong to a surrounding job."""
_SBATCH_OPTIONS = ("partition", "time", "account", "qos", "constraint", "mem", "cpus_per_task", "job_name")
_CHECKED_OPTIONS = {"--nodes": "--nodes N", "-N": "--nodes N", "--gpus-per-node": "--gpus-per-node N",
                    **dict.fromkeys(("--gpus", "-G", "--gres", "--gpus-per-task", "--gpus-per-socket"), "--gpus-per-node N"),
                    "--tres-per-task": "--gpus-per-node N", **dict.fromkeys(("--array", "-a"), "a sweep, or --seeds N"),
                    **dict.fromkeys(("--chdir", "-D"), "absolute paths, or run this command in that folder")}  # fmt: skip
"""Options of sbatch that would overrule what was checked -> what to give instead."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options; options of sbatch keep their names."""
    options = OneLineParser(
        prog="python -m launch.slurm CONFIG.toml", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_argument("--nodes", type=_count, default=1, help="default: 1")
    options.add_argument(
        "--gpus-per-node", type=_gpus, metavar="[TYPE:]N", help="e.g. 4 or a100:4; default: none, train on CPUs"
    )
    options.add_argument(
        "--ranks-per-node",
        type=_count,
        default=ranks_per_node(),
        help="processes per node; default: $RANKS_PER_NODE, else one per GPU, or one without GPUs",
    )
    for name in _SBATCH_OPTIONS:
        options.add_argument(f"--{name.replace('_', '-')}", default="", help="passed on to sbatch")
    options.add_argument("--sbatch", action="append", default=[], metavar="=OPTION", help="any other option of sbatch")
    options.add_argument("--at-once", type=_count, default=0, help="maximum number of array tasks that run at a time")
    options.add_argument(
        "--max-requeues", type=partial(_count, least=0), help="how often the job may requeue itself; default: 20"
    )
    options.add_argument("--dry-run", action="store_true", help="check and print without submitting")
    options.add_argument_group(
        "sweeps",
        "  one task of an array per trial; in a config, the same names under [sweep]\n"
        "  --sweep.SETTING A,B    every combination of the listed values, e.g. --sweep.optim.lr 0.1,0.05\n"
        '  --sweep.SETTING "log_uniform(1e-4, 1e-1)" --trials N    N random values; also uniform, integers, choice\n'
        "  --seeds N              each of them with seeds 0 to N - 1, then report mean and standard deviation\n"
        "  --sweep.trial_seed N, --sweep.metric validation.loss",
    )
    return options


@prints_errors
def main() -> int:
    """Return the exit code: 0 if submitted or printed, 2 for bad input, otherwise sbatch's."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return ExitCode.FINISHED
    if not arguments or arguments[0].startswith("-"):
        first = f"{arguments[0]!r}: " if arguments else ""
        raise InputError(f"command line: {first}the first argument names the config, e.g. cifar10")
    split = split_sweep(arguments)
    sweep = read_sweep(split)
    options, settings = parser().parse_known_args(split.common[1:])
    check_sbatch_options(options.sbatch)
    if options.at_once and not sweep:
        raise InputError(f"--at-once {options.at_once}: there is no sweep; remove it, or give --seeds N")
    training = [arguments[0], *settings]
    if sweep:
        unfinished = check_sweep(options, training, sweep)
        if not unfinished:
            print("all runs of this sweep are finished; nothing is left to do", file=sys.stderr)
            return ExitCode.FINISHED
        array = indices([trial.index for trial in unfinished])
        command = sbatch_command(options, [*training, *split.sweep_words], array)
        for trial in unfinished:
            print(f"task {trial.index}: {shlex.join(trial_arguments(training, sweep, trial))}")
    elif check(options, training):
        run_dir = from_command_line(training).config.run_dir
        raise InputError(f"run_dir = {run_dir}: this run is finished; give another with --run_dir")
    else:
        command = sbatch_command(options, training)
    print(shlex.join(command), flush=True)
    return ExitCode.FINISHED if options.dry_run else submit(command)


def check_sbatch_options(given: Sequence[str]) -> None:
    """Check the options that are passed on to sbatch.

    Raises:
        InputError: one of them would overrule what this command has checked, or keep its variables from the job.
    """
    for option in given:
        name, _, value = option.partition("=")
        name = name if name.startswith("--") else name[:2]
        is_other = name in ("--gres", "--tres-per-task") and "gpu" not in value  # e.g. local disk space
        if (instead := _CHECKED_OPTIONS.get(name)) and not is_other:
            raise InputError(f"--sbatch={option}: it would not be checked; give {instead}")
        if name == "--export" and ",RANKS_PER_NODE=" in value:
            raise InputError(f"--sbatch={option}: it would not be checked; give --ranks-per-node N")
        if name == "--export" and value.split(",")[0] != "ALL":
            raise InputError(
                f"--sbatch={option}: the job needs this command's variables; give --sbatch=--export=ALL,..."
            )


def check_sweep(options: argparse.Namespace, training: Sequence[str], sweep: Sweep) -> list[Trial]:
    """Return the trials that are not finished.

    Raises:
        InputError: some trials are invalid; the lines name them.
    """
    trials = trials_of(sweep)
    finished = check_trials(trials, lambda trial: check(options, trial_arguments(training, sweep, trial), sweep))
    return [trial for trial, is_finished in zip(trials, finished, strict=True) if not is_finished]


def check(options: argparse.Namespace, training: Sequence[str], sweep: Sweep | None = None) -> bool:
    """Check that a training can run on the requested processes and GPUs; return whether its run is finished already.

    Args:
        sweep: the sweep, if the training is one of its trials.

    Raises:
        InputError: it cannot.
    """
    gpus = int((options.gpus_per_node or "0").rpartition(":")[2])
    world_size = options.nodes * (options.ranks_per_node or gpus or 1)
    config, finished = checked_config(training, Topology(world_size=world_size))
    if sweep:
        check_compared(config, sweep)
    if finished:
        return True
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise InputError("device = cuda, and no GPUs are requested; add --gpus-per-node N, or --device cpu")
    if device == "cpu" and gpus:
        raise InputError(
            f"device = cpu: --gpus-per-node {options.gpus_per_node} would reserve unused GPUs; remove one of them"
        )
    config.check_world_size(world_size, device)
    check_batch(config, world_size)
    run_dir = config.run_dir.absolute()
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"run_dir = {config.run_dir}: {existing} is not writable; give another with --run_dir")
    return False


def sbatch_command(options: argparse.Namespace, arguments: Sequence[str], array: str = "") -> list[str]:
    """Return the sbatch command, as a user would type it.

    Args:
        arguments: those of the batch script: config, settings, sweep.
        array: the tasks of an array; empty for a single job.
    """
    command = ["sbatch", f"--nodes={options.nodes}"]
    if options.gpus_per_node:
        command.append(f"--gpus-per-node={options.gpus_per_node}")
    for name in _SBATCH_OPTIONS:
        if value := getattr(options, name):
            command.append(f"--{name.replace('_', '-')}={value}")
    if array:
        command.append(f"--array={array}{f'%{options.at_once}' if options.at_once else ''}")
    script = shipped("slurm/train.sh")
    own = {"MAX_REQUEUES": options.max_requeues, "RANKS_PER_NODE": options.ranks_per_node or None}
    # sbatch keeps only its last --export.
    exports = [option for option in options.sbatch if option.startswith("--export=")]
    given = [word for option in exports for word in option.removeprefix("--export=").split(",") if word != "ALL"]
    names = {word.partition("=")[0] for word in given}
    environment = [] if names & {"VENV", "CONDA_ENV", "CONTAINER"} else venv_export(script.parents[1])
    # Without a value, a variable of that name in the caller's environment counts.
    from_options = [f"{name}={value}" for name, value in own.items() if value is not None and name not in names]
    exported = ["ALL", *environment, *from_options, *given]
    command += [option for option in options.sbatch if option not in exports]
    command += [f"--export={','.join(exported)}", str(script)]
    return [*command, *arguments]


def venv_export(project: Path) -> list[str]:
    """Return `VENV=FOLDER` or `CONDA_ENV=FOLDER` of this Python, unless the script activates this one, or one that was named.

    A folder with a comma in its path cannot be passed: the comma would end it in --export.
    """
    venv = Path(sys.prefix)
    found = names_environment() or (project / ".venv").resolve() == venv.resolve()
    is_conda = (venv / "conda-meta").is_dir() and (project / ".venv/bin/activate").is_file()
    if found or "," in str(venv):
        return []
    if is_conda:  # the script would activate .venv instead
        return [f"CONDA_ENV={venv}"]
    return [f"VENV={venv}"] if (venv / "bin" / "activate").is_file() else []


def submit(command: Sequence[str]) -> int:
    """Run sbatch, which prints to this terminal, and return its exit code."""
    try:
        return subprocess.run(command, check=False, env=_outside_of_jobs(os.environ)).returncode
    except OSError:
        print("error: sbatch: not found; run this on the cluster's login node, or give --dry-run", file=sys.stderr)
        return ExitCode.BAD_INPUT


def _outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of a surrounding job, which the new job would inherit."""
    return {
        name: value for name, value in environment.items() if not name.startswith("SLURM_") or name in _OF_THE_CLUSTER
    }


def _gpus(text: str) -> str:
    """Check Slurm's notation for GPUs, a number after an optional type."""
    _count(text.rpartition(":")[2])
    return text


def _count(text: str, *, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: should be a whole number of at least {least}")
    return int(text)


if __name__ == "__main__":
    run_command(main)
