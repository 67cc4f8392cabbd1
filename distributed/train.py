"""`python -m distributed.train [CONFIG.toml] [--SETTING VALUE ...]`: a wrong input ends here before torch is imported."""

import signal
import sys
import time
from collections.abc import Callable, Sequence

from distributed.checkpoint.download import check_store
from distributed.checkpoint.upload import upload_rest
from distributed.config import TrainConfig, from_command_line, help_text
from distributed.data.sources import cifar, registry
from distributed.errors import ExitCode, InputError
from distributed.host.versions import require
from distributed.process import exits, gc_pause
from distributed.process.signals import SignalStop
from distributed.process.streams import run_command
from distributed.run.folder import RunFolder
from distributed.run.resume_checks import check_resume, check_start
from distributed.topology import Topology, cluster_job, has_launcher, is_elastic

_BANNER = """\
********************************************************************************
*  NO CIFAR-10 IN {root}: TRAINING ON GENERATED IMAGES, NOT ON CIFAR-10.
*  Their accuracy says nothing about CIFAR-10. For the real data set, name the
*  folder of the official archive, --data.root FOLDER, or give --data.download
********************************************************************************
"""


def main() -> int:
    """The exit code; `ExitCode` says what each means."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return ExitCode.FINISHED
    if is_elastic():  # until agent_store.py has published what the next round needs
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with SignalStop(launched=has_launcher(), exit_before_first_step=True) as stop:
        return _run(stop)


def _run(stop: SignalStop) -> int:
    topology = Topology()
    try:
        topology = Topology.from_environment()
        topology.check_endpoint()
        config, finished = checked_config(sys.argv[1:], topology)
    except InputError as error:
        return refuse(error, topology)
    if finished:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if topology.is_main:
            folder = RunFolder(config.run_dir)
            print(f"{folder.path}: this run is finished; evaluate it with python -m distributed.evaluate {folder.path}, "
                  f"or start another with --run_dir", file=sys.stderr)  # fmt: skip
            upload_rest(config)
        return ExitCode.FINISHED
    with gc_pause.gc_paused():  # torch comes in here, after all that could be wrong was checked
        from distributed.run_process import run_to_exit_code

    return run_to_exit_code(config, topology, stop)


def checked_config(
    arguments: Sequence[str], topology: Topology, adapt: Callable[[TrainConfig], TrainConfig] | None = None
) -> tuple[TrainConfig, bool]:
    """The config of these arguments with its data and run folder looked at, and whether that run is finished.

    `adapt` is a launcher's own part: it takes out the section that is meant for it, and may raise InputError.

    Where the user named neither a config file nor data, CIFAR-10 is taken if it is there, else generated images, under
    a banner; in a cluster's job, whose terminal nobody watches, that is an error.

    Raises:
        InputError: anything that cannot be used, all of it that could be found out at once.
    """
    command = from_command_line(arguments)
    config = command.config
    if not command.names_data and config.data.name == "cifar10" and not cifar.is_there("cifar10", config.data.root):
        root = config.data.root.resolve()
        if job := cluster_job():
            raise InputError(
                f"data.root = {root}: CIFAR-10 is not there, and {job} names neither a config nor a data set; give a config "
                "first (configs/cifar10.toml), --data.root FOLDER, or --data.name generated10 for generated images"
            )
        config = from_command_line(arguments, default_data="generated10").config
        if topology.is_main:
            print(_BANNER.format(root=root), file=sys.stderr)
    if adapt:
        config = adapt(config)
    if config.scaling:
        raise InputError(
            f"scaling.num_workers = {config.scaling.num_workers}: scaling is for python -m launch.ray_train, and would be "
            "ignored here; remove that section"
        )
    if config.device != "auto" or config.exact.shards != "auto":  # else it depends on what torch will find
        config.check_world_size(topology.world_size, config.device)
    if config.engine.name == "deepspeed":
        require("deepspeed", at_least=(0, 19), needed_by="engine.name = deepspeed")
    finished = check_resume(config)
    # Rank 0 alone asks the store, which may have what makes init_from needless.
    begun = config.checkpoint.upload_to and (not topology.is_main or check_store(config))
    if not begun:
        check_start(config)
    if not finished:
        registry.prepare(config.data)
    return config, finished


def refuse(error: InputError, topology: Topology) -> int:
    """Local rank 0 says what is wrong; the others wait, so that torchrun does not end it before it has spoken."""
    reason = "\n".join(error.lines)
    exits.write_error_file(reason, is_cause=True)
    if topology.local_rank == 0:
        error.report()
    if topology.has_waiting_peers:
        from distributed.comm.peers import (
            notify_waiting_peers,  # with torch: others may have found nothing wrong, and wait
        )

        notify_waiting_peers(topology, error.exit_code, reason)
    elif topology.local_rank:
        time.sleep(3)
    return ExitCode.BAD_INPUT


if __name__ == "__main__":
    # Threads of gloo or NCCL that wait for a dead peer must not keep the process.
    run_command(main, skip_cleanup=True)
