"""`python -m launch.plan ADDRESS [CONFIG] [--SETTING VALUE ...]`: what a job is about to run, for the batch script.

Written to stdout, each ended by a zero byte: run folder, address, port, ranks a node, CPUs a node, then the arguments of
`distributed.train`. Nothing for a run that is finished. Whatever is wrong ends here, in a second. Imports no torch.
"""

import sys

from distributed.config import TrainConfig
from distributed.errors import ExitCode, InputError
from distributed.topology import Topology, within_quota
from distributed.train import checked_config
from launch.address import free_port, reachable
from launch.allocation import Allocation
from launch.arguments import of_task


def main() -> int:
    """The exit code: 0, or 2 where the input is wrong."""
    head, words = sys.argv[1], sys.argv[2:]
    try:
        allocation = Allocation.from_environment()
        arguments = of_task(words, allocation.array_task)
        world_size = allocation.nodes * allocation.ranks
        config, finished = checked_config(arguments, Topology(world_size=world_size))
        if finished:
            print(f"{config.run_dir}: this run is finished; nothing is left to do", file=sys.stderr)
            return ExitCode.FINISHED
        check_batch(config, world_size)
        address = reachable(head, nodes=allocation.nodes)
        port = free_port(allocation.job)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    if not config.threads:  # the cores of the job, which need not be all that the process may use
        arguments += ["--threads", str(max(1, within_quota(allocation.cpus) // allocation.ranks))]
    facts = (config.run_dir.absolute(), address, port, allocation.ranks, allocation.cpus)
    sys.stdout.write("".join(f"{one}\0" for one in (*facts, *arguments)))
    return ExitCode.FINISHED


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Raises InputError where some ranks would have no image of a micro-batch."""
    micro_batch = config.global_batch_size // config.accumulation
    if world_size > micro_batch:
        raise InputError(
            f"global_batch_size = {config.global_batch_size} with accumulation = {config.accumulation} gives micro-batches of "
            f"{micro_batch} images, fewer than the {world_size} processes; raise it, or ask for fewer nodes or GPUs"
        )


if __name__ == "__main__":
    raise SystemExit(main())
