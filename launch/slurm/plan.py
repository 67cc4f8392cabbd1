"""`python -m launch.slurm.plan ADDRESS [CONFIG] [--SETTING VALUE ...]`: checks a job, and prints its plan for the batch script.

Prints, each terminated by a zero byte: run folder, rendezvous address, port, ranks per node, CPUs per node, the folder of
all runs of an array, the metric of a sweep, then the arguments of `distributed.train`. Prints nothing for a finished run.
Reports every input error within a second. Imports no torch.
"""

import sys
from collections.abc import Sequence

from distributed.config import TrainConfig, from_command_line
from distributed.config.named import config_file
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.host.cpu_quota import within_quota
from distributed.topology import Topology
from distributed.train import checked_config
from launch.address import free_port, resolve_address
from launch.environment import Allocation
from launch.slurm.task import task_of
from launch.sweep import with_settings


@prints_errors
def main() -> int:
    """Return the exit code: 0, or 2 for bad input."""
    given = sys.argv[2:]
    if len(sys.argv) < 2:
        raise InputError(
            "command line: the address is missing; the batch script gives it: sbatch slurm/train.sh CONFIG"
        )
    allocation = Allocation.from_environment()
    if allocation.missing_folder:
        check_config_path(given, allocation.missing_folder)
    task = task_of(given, allocation.array_task)
    arguments = task.arguments
    if allocation.missing_folder:
        check_setting_paths(arguments, allocation.missing_folder)
    world_size = allocation.nodes * allocation.ranks
    config, finished = checked_config(arguments, Topology(world_size=world_size))
    if finished:
        print(f"{config.run_dir}: this run is finished; nothing is left to do", file=sys.stderr)
        return ExitCode.FINISHED
    check_batch(config, world_size)
    address = resolve_address(sys.argv[1], nodes=allocation.nodes)
    port = free_port(allocation.job)
    if not config.threads:  # divide the job's cores; this process itself may be allowed to use more
        threads = max(1, within_quota(allocation.cpus) // allocation.ranks)
        arguments = with_settings(arguments, {"threads": str(threads)})
    job = (config.run_dir.absolute(), address, port, allocation.ranks, allocation.cpus)
    fields = (*job, task.folder or "", task.metric, *arguments)
    sys.stdout.write("".join(f"{field}\0" for field in fields))
    return ExitCode.FINISHED


def check_config_path(arguments: Sequence[str], folder: str) -> None:
    """Check that the config file does not depend on the job's folder, which this node does not have.

    Raises:
        InputError: its path is relative.
    """
    first = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if first and not config_file(first).is_absolute():
        raise InputError(_relative_to_missing(first, folder))


def check_setting_paths(arguments: Sequence[str], folder: str) -> None:
    """Check that no setting depends on the job's folder, which this node does not have.

    Raises:
        InputError: a path is relative, so that it would point elsewhere here.
    """
    config = from_command_line(arguments).config
    paths = {
        "run_dir": config.run_dir,
        "init_from": config.init_from,
        "data.root": getattr(config.data, "root", None),
        "data.cache": getattr(config.data, "cache", None),
    }
    relative = [f"{name} = {path}" for name, path in paths.items() if path and not path.is_absolute()]
    if (mlflow := config.logging.mlflow) and mlflow.relative_database:
        relative.append(f"logging.mlflow.tracking_uri = {mlflow.tracking_uri}")
    if relative:
        raise InputError(*(_relative_to_missing(setting, folder) for setting in relative))


def _relative_to_missing(path: str, folder: str) -> str:
    return f"{path}: relative to {folder}, which this node does not have; create it again, or give an absolute path"


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Check that every rank gets an image of each micro-batch.

    Raises:
        InputError: a micro-batch has fewer images than there are ranks.
    """
    micro_batch = config.global_batch_size // config.grad_accum_steps
    if world_size > micro_batch:
        raise InputError(
            f"global_batch_size = {config.global_batch_size} with grad_accum_steps = {config.grad_accum_steps} gives "
            f"micro-batches of {micro_batch} images, fewer than the {world_size} processes; raise it, or request fewer nodes "
            "or GPUs"
        )


if __name__ == "__main__":
    raise SystemExit(main())
