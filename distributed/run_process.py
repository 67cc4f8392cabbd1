"""Runs the recipe in a training process and turns every ending into an exit code and a one-line message."""

import shlex

import torch
from loguru import logger

from distributed.checkpoint.upload import log_upload_result
from distributed.comm.agent_store import ForeignJobError, find_agent_store
from distributed.comm.peers import failure_message, notify_waiting_peers
from distributed.comm.same_config import config_digest
from distributed.config import TrainConfig
from distributed.config.data import GeneratedData
from distributed.dry_run import dry_run as try_steps
from distributed.errors import ExitCode, InputError, NotFiniteError, PeerError, StorageError, counted
from distributed.inference.result import TrainResult
from distributed.process import exits, logs
from distributed.process.optional_output import one_line
from distributed.process.signals import SignalStop
from distributed.recipe import train
from distributed.run.folder import RunFolder
from distributed.topology import Topology


def run_to_exit_code(config: TrainConfig, topology: Topology, stop: SignalStop, dry_run: bool = False) -> int:
    """Train, or only try it, and return the exit code.

    Under torchrun, also report the reason for a failure or stop to its summary.
    """
    logs.terminal_logs(topology.rank, level=config.logging.level)
    agents = find_agent_store(topology)
    try:
        if agents:
            agents.register(config_digest(config))
        stop.release_sigterm()
        if dry_run:
            try_steps(config)
            return ExitCode.FINISHED
        result = train(config, stop=stop)
    except (Exception, SystemExit) as error:  # a sink or a network may call sys.exit(), even with code 0
        _log_error(error, topology)
        code = getattr(error, "exit_code", ExitCode.FAILED)
        exits.write_error_file(failure_message(error), is_cause=not isinstance(error, PeerError))
        if agents and isinstance(error, ForeignJobError):
            agents.stop_agent()
        elif not isinstance(error, PeerError):
            notify_waiting_peers(topology, code, failure_message(error))
        return int(code)
    if topology.is_main:
        _log_result(config, result)
        log_upload_result(config)
    if not result.stop_reason:
        return ExitCode.FINISHED
    exits.write_error_file(_stop_message(result), is_cause=False)
    return ExitCode.STOPPED


def _log_error(error: BaseException, topology: Topology) -> None:
    """Log expected errors by their message, all others with a traceback."""
    if isinstance(error, torch.OutOfMemoryError):
        logger.error(
            "rank {}: {}; raise grad_accum_steps in a new run, set grad_checkpointing.enabled = true, or free the GPU",
            topology.rank, one_line(error),
        )  # fmt: skip
        return
    if not isinstance(error, InputError | NotFiniteError | StorageError | PeerError):
        logger.opt(exception=True).error("rank {} failed", topology.rank)
        return
    for line in str(error).splitlines():
        logger.error("{}", line)
    if error.__cause__:
        logger.opt(exception=error.__cause__).debug("caused by")


def _stop_message(result: TrainResult) -> str:
    return f"stopped by {result.stop_reason} at step {result.step}, everything saved; the same command resumes"


def _log_result(config: TrainConfig, result: TrainResult) -> None:
    if result.stop_reason:
        logger.warning("{}", _stop_message(result))
        return
    run = RunFolder(config.run_dir)
    epochs = counted(result.epoch, "epoch")
    early = ", stopped early" if result.stopped_early else ""
    best = f"; best validation epoch {result.best.epoch + 1} ({result.best.value:.4f})" if result.best else ""
    logger.info("finished after {}, {} steps{}{}", epochs, result.step, early, best)
    curves = f", curves {run.curves}" if config.logging.curves else ""
    board = f", TensorBoard: tensorboard --logdir {shlex.quote(str(run.path))}" if config.logging.tensorboard else ""
    logger.info("checkpoints {}{}{}", run.checkpoints, curves, board)
    if isinstance(config.data, GeneratedData):
        logger.warning("these results are on generated images, not on CIFAR")
