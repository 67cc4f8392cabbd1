"""`python -m distributed.train [CONFIG.toml] [--SETTING VALUE ...] [--dry-run]`: rejects bad input before importing torch."""

import sys
import time
from collections.abc import Callable, Sequence
from shlex import quote
from typing import NamedTuple

from distributed.checkpoint.download import store_has_run
from distributed.checkpoint.upload import upload_remaining
from distributed.config import TrainConfig, from_command_line, help_text
from distributed.config.data import CifarData
from distributed.data.sources import cifar, registry
from distributed.errors import ExitCode, InputError, reachable_paths
from distributed.host.versions import require_deepspeed
from distributed.metrics.installed import check_installed
from distributed.process import exits, gc_pause
from distributed.process.signals import SignalStop
from distributed.process.streams import run_command
from distributed.run.folder import RunFolder
from distributed.run.resume_checks import check_init_from, check_run_folder, is_finished
from distributed.topology import Topology, cluster_job, has_launcher, is_elastic, tasks_of_step

_BANNER = """\
********************************************************************************
*  NO CIFAR-10 IN {root}: TRAINING ON GENERATED IMAGES, NOT ON CIFAR-10.
*  Their accuracy says nothing about CIFAR-10. For the real data set, name the
*  folder of the official archive, --data.root FOLDER, or give --data.download
********************************************************************************
"""


DRY_RUN = ("--dry-run", "--dry_run")
"""The flag that tries a run without starting it. Not a setting, so no config file can leave a run undone."""


class CheckedRun(NamedTuple):
    """A config whose data and run folder were checked."""

    config: TrainConfig
    is_finished: bool


def main() -> int:
    """Return the exit code; `ExitCode` says what each means."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return ExitCode.FINISHED
    # Held until agent_store.py has published what torchrun's next round needs.
    with SignalStop(launched=has_launcher(), exit_before_first_step=True, holds_sigterm=is_elastic()) as stop:
        return _run(stop)


def _run(stop: SignalStop) -> int:
    topology = Topology()
    arguments = [argument for argument in sys.argv[1:] if argument not in DRY_RUN]
    dry_run = len(arguments) < len(sys.argv) - 1
    try:
        topology = Topology.from_environment()
        check_one_task(topology)
        topology.check_endpoint()
        config, finished = checked_config(arguments, topology)
    except InputError as error:
        return refuse(error, topology)
    if finished:
        stop.release_sigterm()
        if topology.is_main:
            folder = RunFolder(config.run_dir).path
            print(f"{folder}: this run is finished; evaluate it with python -m distributed.evaluate {quote(str(folder))}, "
                  f"or start another with --run_dir", file=sys.stderr)  # fmt: skip
            if not dry_run:
                upload_remaining(config)
        return ExitCode.FINISHED
    with gc_pause.gc_paused():  # imports torch, now that all input has been checked
        from distributed.run_process import run_to_exit_code

    return run_to_exit_code(config, topology, stop, dry_run)


def check_one_task(topology: Topology) -> None:
    """Raise InputError if srun started this command more than once: each copy would train alone."""
    if not topology.launched and (tasks := tasks_of_step()) > 1:
        raise InputError(
            f"environment: SLURM_STEP_NUM_TASKS = {tasks}: srun starts {tasks} separate runs; submit slurm/train.sh, or "
            "start torchrun with one task per node; if they are meant to be separate, unset that variable"
        )


def checked_config(
    arguments: Sequence[str], topology: Topology, adapt: Callable[[TrainConfig], TrainConfig] | None = None
) -> CheckedRun:
    """Build the config from command-line arguments and check it with its data and run folder.

    If the arguments name neither a config file nor data, CIFAR-10 is used if present, otherwise generated images,
    under a banner. In a cluster job, where a banner would go unnoticed, missing data is an error instead.

    Args:
        adapt: a launcher's hook that removes its own section from the config. May raise InputError.

    Raises:
        InputError: the config, data or run folder cannot be used. Reports as many errors as possible together.
    """
    with reachable_paths():
        return _checked_config(arguments, topology, adapt)


def _checked_config(
    arguments: Sequence[str], topology: Topology, adapt: Callable[[TrainConfig], TrainConfig] | None
) -> CheckedRun:
    config = _config_with_data(arguments, topology)
    if adapt:
        config = adapt(config)
    if config.scaling:
        raise InputError(
            f"scaling.num_workers = {config.scaling.num_workers}: scaling is for python -m launch.ray_train, and would be "
            "ignored here; remove that section"
        )
    if config.device != "auto" or config.exact.shards != "auto":  # otherwise it depends on the GPUs that torch finds
        config.check_world_size(topology.world_size, config.device)
    config.check_importable()
    if config.engine.name == "deepspeed":
        require_deepspeed()
    if topology.is_main:
        check_installed(config.logging)
    saved = check_run_folder(config)
    finished = is_finished(config, saved)
    # Only rank 0 queries the store. The other ranks leave it to rank 0 to check init_from.
    in_store = config.checkpoint.upload_to and (not topology.is_main or store_has_run(config, saved))
    if saved is None and not in_store:
        check_init_from(config)
    if not finished:
        registry.prepare(config.data)
    return CheckedRun(config, finished)


def _config_with_data(arguments: Sequence[str], topology: Topology) -> TrainConfig:
    command = from_command_line(arguments)
    config = command.config
    if command.names_data or not isinstance(config.data, CifarData) or cifar.is_there("cifar10", config.data.root):
        return config
    root = config.data.root.resolve()
    if job := cluster_job():
        raise InputError(
            f"data.root = {root}: CIFAR-10 is not there, and {job} names neither a config nor a data set; give a config "
            "first (configs/cifar10.toml), --data.root FOLDER, or --data.name generated10 for generated images"
        )
    config = from_command_line(arguments, default_data="generated10").config
    if topology.is_main:
        print(_BANNER.format(root=root), file=sys.stderr)
    return config


def refuse(error: InputError, topology: Topology) -> int:
    """Print the error on local rank 0 only. Other ranks wait, so that torchrun does not end rank 0 before it has printed."""
    reason = "\n".join(error.lines)
    exits.write_error_file(reason, is_cause=True)
    if topology.local_rank == 0:
        error.report()
    if topology.has_waiting_peers:
        # Imports torch, because the other ranks may have found no error and be waiting in the rendezvous.
        from distributed.comm.peers import notify_waiting_peers

        notify_waiting_peers(topology, error.exit_code, reason)
    elif topology.local_rank:
        time.sleep(3)
    return ExitCode.BAD_INPUT


if __name__ == "__main__":
    run_command(main, skip_cleanup=True)  # threads of gloo or NCCL may wait for a dead peer forever
