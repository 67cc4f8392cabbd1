"""Distributed training of AlexNet variants on CIFAR: one recipe, any launcher, the same bits after every kill.

The public interface, see docs/api.md: the names of `__all__`, imported on first use, and `distributed.recipe.train`.
`import distributed` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distributed import name_clash  # noqa: F401  (checks on import)

if TYPE_CHECKING:
    from distributed.config import TrainConfig
    from distributed.config.load import load as load_config
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
_PLACES = {
    "Engine": ("distributed.engine.protocol", "Engine"),
    "EpochMetrics": ("distributed.metrics.records", "EpochMetrics"),
    "Sink": ("distributed.metrics.records", "Sink"),
    "StopSource": ("distributed.training.stop", "StopSource"),
    "TrainConfig": ("distributed.config", "TrainConfig"),
    "TrainMetrics": ("distributed.metrics.records", "TrainMetrics"),
    "TrainedRun": ("distributed.inference.trained_run", "TrainedRun"),
    "load": ("distributed.inference.trained_run", "load"),
    "load_config": ("distributed.config.load", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
