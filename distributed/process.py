"""The edge of a training process: the recipe in, an exit code out, and what went wrong in words."""

import re
import signal

from loguru import logger

from distributed import logs
from distributed.agent_store import AgentStore, AnotherJob
from distributed.build import config_digest
from distributed.config import TrainConfig
from distributed.errors import ExitCode, InputError, NotFiniteError, StorageError
from distributed.recipe import train
from distributed.run_folder import RunFolder
from distributed.state import TrainState
from distributed.stop import SignalStop
from distributed.topology import Topology
from distributed.uploads import tell_ending

# What gloo and NCCL say where another rank has died; the rank that died first has the real message.
_LOST_PEER = re.compile(
    r"closed by peer|connection reset|timed out waiting|broken pipe|socket ?timeout|remote process", re.I
)


def run_to_exit_code(config: TrainConfig, topology: Topology) -> int:
    """Train under signal handling; every way to end has its exit code."""
    logs.terminal_logs(topology.rank, level=config.logging.level)
    agents = AgentStore.find(topology)
    try:
        if agents:
            agents.enter(config_digest(config))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        with SignalStop(launched=topology.launched) as stop:
            state = train(config, stop=stop)
    except (InputError, NotFiniteError, StorageError) as error:
        for line in str(error).splitlines():
            logger.error("{}", line)
        if agents and isinstance(error, AnotherJob):
            agents.leave()
        return error.exit_code
    except RuntimeError as error:
        if not _LOST_PEER.search(str(error)):
            logger.opt(exception=True).error("rank {} failed", topology.rank)
        else:
            logger.error("rank {} lost contact with another rank, whose own message says why", topology.rank)
            logger.opt(exception=True).debug("what the process group said")
        return ExitCode.FAILED
    except Exception:
        logger.opt(exception=True).error("rank {} failed", topology.rank)
        return ExitCode.FAILED
    if topology.is_main:
        _say_ending(config, state)
        tell_ending(config)
    return ExitCode.STOPPED if state.stop_reason else ExitCode.FINISHED


def _say_ending(config: TrainConfig, state: TrainState) -> None:
    run = RunFolder(config.run_dir)
    if state.stop_reason:
        logger.warning(
            "stopped by {} at step {}, everything saved; the same command goes on from here",
            state.stop_reason,
            state.step,
        )
        return
    early = ", stopped early" if state.stopped_early else ""
    best = f"; best validation epoch {state.best.epoch + 1} ({state.best.value:.4f})" if state.best else ""
    logger.info("finished after {} epochs, {} steps{}{}", state.epoch, state.step, early, best)
    logger.info(
        "curves {}, checkpoints {}, TensorBoard: tensorboard --logdir {}", run.curves, run.checkpoints, run.path
    )
    if config.data.name.startswith("generated"):
        logger.warning("these results are on generated images, not on CIFAR")
