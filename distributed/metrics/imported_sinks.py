"""Builds the sinks that `logging.sinks` names by import path, and guards training against them."""

from distributed.config import TrainConfig
from distributed.config.user_code import UserFunction
from distributed.metrics.installed import check_installed
from distributed.metrics.records import Sink
from distributed.metrics.sinks import OptionalSink
from distributed.metrics.wandb_sink import check_credentials

_METHODS = ("log_step", "log_epoch", "close")


def open_sinks(config: TrainConfig) -> list[Sink]:
    """Build the sinks of `logging.sinks`, each as Class(config=config, run_dir=run_dir). Called on rank 0.

    Once training runs, the first error of one is a warning, and it is not called again.

    Raises:
        InputError: one cannot be imported or built or lacks a method, or a package or key for the other sinks is missing.
    """
    check_installed(config.logging)
    if config.logging.wandb:
        check_credentials(config.logging.wandb)
    return [_guarded(path, _built(path, config)) for path in config.logging.sinks]


def _guarded(path: str, sink: Sink) -> OptionalSink:
    return OptionalSink(path, lambda: sink)


def _built(path: str, config: TrainConfig) -> Sink:
    given = dict.fromkeys(("config", "run_dir"), "which every sink gets; add it to the arguments")
    function = UserFunction(setting="logging.sinks", path=path, noun="class", result="the sink", given=given)
    sink: Sink = function.call(function.load(), config=config, run_dir=config.run_dir)
    if missing := [name for name in _METHODS if not callable(getattr(sink, name, None))]:
        raise function.error(f"{type(sink).__name__} has no method {missing[0]}; a sink has {', '.join(_METHODS)}")
    return sink
