"""`python -m launch.slurm CONFIG.toml [OPTIONS] [--SETTING VALUE ...]`: checks a run and its resources, then submits it.

Errors are reported now instead of after hours in the queue. Every argument that is not an option below is a setting of the
training. Imports no torch.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import replace_text
from distributed.host.shipped import shipped
from distributed.process.streams import run_command
from distributed.topology import Topology
from distributed.train import checked_config
from launch.environment import names_environment
from launch.slurm.plan import check_batch
from launch.sweep_arguments import combinations, in_subfolder, split_sweep

_SBATCH_OPTIONS = ("partition", "time", "account", "qos", "constraint", "mem", "cpus_per_task", "job_name")


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options; options of sbatch keep their names."""
    options = argparse.ArgumentParser(
        prog="python -m launch.slurm CONFIG.toml", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_argument("--nodes", type=_count, default=1)
    options.add_argument("--gpus-per-node", type=_count, default=0, help="default: none, train on CPUs")
    options.add_argument(
        "--ranks-per-node", type=_count, default=0, help="processes per node; default: one per GPU, or one without GPUs"
    )
    for name in _SBATCH_OPTIONS:
        options.add_argument(f"--{name.replace('_', '-')}", default="", help="passed on to sbatch")
    options.add_argument("--sbatch", action="append", default=[], metavar="=OPTION", help="any other option of sbatch")
    options.add_argument("--at-once", type=_count, default=0, help="maximum number of array tasks that run at a time")
    options.add_argument("--max-requeues", type=int, default=20, help="how often the job may requeue itself")
    options.add_argument("--dry-run", action="store_true", help="check and print without submitting")
    options.add_argument_group(
        "arrays",
        "  --seeds N              train with seeds 0 to N - 1, then report mean and standard deviation\n"
        "  --sweep.SETTING A,B    train once per value, e.g. --sweep.optim.lr 0.1,0.05; several: every combination",
    )
    return options


@prints_errors
def main() -> int:
    """Return the exit code: 0 if submitted or printed, 2 for bad input, otherwise sbatch's."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        parser().print_help()
        return ExitCode.FINISHED if arguments else ExitCode.BAD_INPUT
    try:
        if arguments[0].startswith("-"):
            raise InputError(f"command line: {arguments[0]!r}: the first argument names the config, e.g. cifar10")
        common, sweep = split_sweep(arguments[1:])
        options, settings = parser().parse_known_args(common)
        training = [arguments[0], *settings]
        trainings = swept_trainings(training, sweep)
        ranks = options.ranks_per_node or options.gpus_per_node or 1
        for one in trainings:
            check(one, world_size=options.nodes * ranks, gpus=options.gpus_per_node)
        file = sweep_file(training) if sweep else None
        command = sbatch_command(options, file, trainings)
        if file and not options.dry_run:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, "".join(shlex.join(one) + "\n" for one in trainings))
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; give another --run_dir", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if sweep:
        print(*(f"task {index}: {shlex.join(one)}" for index, one in enumerate(trainings)), sep="\n")
    print(shlex.join(command), flush=True)
    return ExitCode.FINISHED if options.dry_run else submit(command)


def swept_trainings(training: Sequence[str], sweep: dict[str, list[str]]) -> list[list[str]]:
    """Return the arguments of each training: one per combination of the sweep, each with a run folder of its own."""
    if not sweep:
        return [list(training)]
    return [in_subfolder(training, one.nested_folder, *one.arguments) for one in combinations(sweep)]


def check(training: Sequence[str], *, world_size: int, gpus: int) -> None:
    """Check that a training can run on `world_size` processes and `gpus` GPUs per node.

    Raises:
        InputError: it cannot, or its run is finished.
    """
    config, finished = checked_config(training, Topology(world_size=world_size))
    if finished:
        raise InputError(f"run_dir = {config.run_dir}: this run is finished; give another with --run_dir")
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise InputError("device = cuda, and no GPUs are requested; add --gpus-per-node N, or --device cpu")
    config.check_world_size(world_size, device)
    check_batch(config, world_size)
    run_dir = config.run_dir.absolute()
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"run_dir = {config.run_dir}: {existing} is not writable; give another with --run_dir")


def sweep_file(training: Sequence[str]) -> Path:
    """Return the file that lists the trainings of an array, beside their run folders."""
    return Path(in_subfolder(training, "sweep.txt")[-1]).absolute()


def sbatch_command(options: argparse.Namespace, file: Path | None, trainings: Sequence[Sequence[str]]) -> list[str]:
    """Return the sbatch command, as a user would type it.

    Args:
        file: the sweep file of an array; None for a single training.
    """
    command = ["sbatch", f"--nodes={options.nodes}"]
    if options.gpus_per_node:
        command.append(f"--gpus-per-node={options.gpus_per_node}")
    for name in _SBATCH_OPTIONS:
        if value := getattr(options, name):
            command.append(f"--{name.replace('_', '-')}={value}")
    if file:
        at_once = f"%{options.at_once}" if options.at_once else ""
        command.append(f"--array=0-{len(trainings) - 1}{at_once}")
    script = shipped("slurm/train.sh")
    exported = ["ALL", f"MAX_REQUEUES={options.max_requeues}", *_venv_export(script.parents[1])]
    if options.ranks_per_node:
        exported.append(f"RANKS_PER_NODE={options.ranks_per_node}")
    command += [*options.sbatch, f"--export={','.join(exported)}", str(script)]
    return command + ([f"@{file}"] if file else list(trainings[0]))


def _venv_export(project: Path) -> list[str]:
    """Return `VENV=FOLDER` of this Python, unless the script finds an environment without it.

    A folder with a comma in its path cannot be passed: the comma would end it in --export.
    """
    venv = Path(sys.prefix)
    found = names_environment() or (project / ".venv" / "bin" / "activate").is_file()
    return [] if found or "," in str(venv) or not (venv / "bin" / "activate").is_file() else [f"VENV={venv}"]


def submit(command: Sequence[str]) -> int:
    """Run sbatch, which prints to this terminal, and return its exit code."""
    try:
        return subprocess.run(command, check=False).returncode
    except OSError:
        print("error: sbatch: not found; run this on the cluster's login node, or give --dry-run", file=sys.stderr)
        return ExitCode.BAD_INPUT


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: should be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    run_command(main)
