"""`python -m launch.slurm.plan ADDRESS [CONFIG] [--SETTING VALUE ...]`: what a job is about to run, for the batch script.

Written to stdout, each ended by a zero byte: run folder, address, port, ranks a node, CPUs a node, then the arguments of
`distributed.train`. Nothing for a run that is finished. Whatever is wrong ends here, in a second. Imports no torch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from distributed.config import TrainConfig, from_command_line
from distributed.config.named import config_file
from distributed.errors import ExitCode, InputError
from distributed.host.cpu_quota import within_quota
from distributed.topology import Topology
from distributed.train import checked_config
from launch.address import free_port, reachable
from launch.environment import Allocation
from launch.sweep_arguments import of_task


def main() -> int:
    """The exit code: 0, or 2 where the input is wrong."""
    words = sys.argv[2:]
    try:
        if len(sys.argv) < 2:
            raise InputError(
                "command line: the address is missing; the batch script gives it: sbatch slurm/train.sh CONFIG"
            )
        allocation = Allocation.from_environment()
        if allocation.missing_folder:
            check_file(words, allocation.missing_folder)
        arguments = of_task(words, allocation.array_task)
        if allocation.missing_folder:
            check_paths(arguments, allocation.missing_folder)
        world_size = allocation.nodes * allocation.ranks
        config, finished = checked_config(arguments, Topology(world_size=world_size))
        if finished:
            print(f"{config.run_dir}: this run is finished; nothing is left to do", file=sys.stderr)
            return ExitCode.FINISHED
        check_batch(config, world_size)
        address = reachable(sys.argv[1], nodes=allocation.nodes)
        port = free_port(allocation.job)
    except InputError as error:
        error.report()
        return ExitCode.BAD_INPUT
    if not config.threads:  # the cores of the job, which need not be all that the process may use
        arguments += ["--threads", str(max(1, within_quota(allocation.cpus) // allocation.ranks))]
    facts = (config.run_dir.absolute(), address, port, allocation.ranks, allocation.cpus)
    sys.stdout.write("".join(f"{one}\0" for one in (*facts, *arguments)))
    return ExitCode.FINISHED


def check_file(words: Sequence[str], folder: str) -> None:
    """Raises InputError if the config or sweep file is relative to the job's folder, which is not there."""
    given = "" if not words or words[0].startswith("-") else words[0]
    named = given.removeprefix("@") if given.startswith("@") else given and str(config_file(given))
    if given and not Path(named).is_absolute():
        raise InputError(_relative(given, folder))


def check_paths(arguments: Sequence[str], folder: str) -> None:
    """Raises InputError if a setting is relative to the job's folder, which is not there: it would mean another place."""
    config = from_command_line(arguments).config
    paths = {
        "run_dir": config.run_dir,
        "init_from": config.init_from,
        "data.root": getattr(config.data, "root", None),
        "data.cache": getattr(config.data, "cache", None),
    }
    relative = [f"{name} = {path}" for name, path in paths.items() if path and not path.is_absolute()]
    if relative:
        raise InputError(*(_relative(one, folder) for one in relative))


def _relative(given: str, folder: str) -> str:
    return (
        f"{given}: relative to {folder}, which is not there on this node; make it again, or give the path from the root"
    )


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Raises InputError where some ranks would have no image of a micro-batch."""
    micro_batch = config.global_batch_size // config.grad_accum_steps
    if world_size > micro_batch:
        raise InputError(
            f"global_batch_size = {config.global_batch_size} with grad_accum_steps = {config.grad_accum_steps} gives "
            f"micro-batches of {micro_batch} images, fewer than the {world_size} processes; raise it, or ask for fewer nodes "
            "or GPUs"
        )


if __name__ == "__main__":
    raise SystemExit(main())
