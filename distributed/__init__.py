"""Distributed training of image classifiers: one recipe, any launcher, the same bits after every kill.

The public interface, see docs/api.md: the names of `__all__`, imported on first use, and `distributed.recipe.train`.
`import distributed` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distributed import name_clash  # noqa: F401  (checks on import)
from distributed.process.early_interrupt import exit_on_interrupt

exit_on_interrupt()

if TYPE_CHECKING:
    from distributed.config import TrainConfig, load_config
    from distributed.engine.protocol import Engine
    from distributed.inference.trained_run import TrainedRun, load
    from distributed.metrics.records import EpochMetrics, Sink, TrainMetrics
    from distributed.training.stop import StopSource

__all__ = [
    "Engine",
    "EpochMetrics",
    "Sink",
    "StopSource",
    "TrainConfig",
    "TrainMetrics",
    "TrainedRun",
    "load",
    "load_config",
]
_MODULES = {
    "Engine": "distributed.engine.protocol",
    "EpochMetrics": "distributed.metrics.records",
    "Sink": "distributed.metrics.records",
    "StopSource": "distributed.training.stop",
    "TrainConfig": "distributed.config",
    "TrainMetrics": "distributed.metrics.records",
    "TrainedRun": "distributed.inference.trained_run",
    "load": "distributed.inference.trained_run",
    "load_config": "distributed.config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
