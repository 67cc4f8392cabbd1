"""Settings of a run: the tree, where its values come from, and the messages when one is wrong. Imports no torch."""

from distributed import name_clash  # noqa: F401  (checks on import)
from distributed.config.help import help_text
from distributed.config.load import as_toml, changes_experiment, differences, load, toml_value, with_values
from distributed.config.train_config import TrainConfig

__all__ = [
    "TrainConfig",
    "as_toml",
    "changes_experiment",
    "differences",
    "help_text",
    "load",
    "toml_value",
    "with_values",
]
