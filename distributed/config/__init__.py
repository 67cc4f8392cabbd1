"""The settings of a run: their tree, where their values come from, and messages about invalid ones. Imports no torch."""

from distributed import name_clash  # noqa: F401  (checks on import)
from distributed.config.differences import changes_experiment, differences
from distributed.config.help import help_text
from distributed.config.load import CommandLine, from_command_line, from_saved, load_config, read_saved, with_values
from distributed.config.toml_text import as_toml, toml_value
from distributed.config.train_config import TrainConfig

__all__ = [
    "CommandLine",
    "TrainConfig",
    "as_toml",
    "changes_experiment",
    "differences",
    "from_command_line",
    "from_saved",
    "help_text",
    "load_config",
    "read_saved",
    "toml_value",
    "with_values",
]
