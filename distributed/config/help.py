"""The text of --help: every setting with its type, default and description."""

import shutil
import textwrap
from typing import Any

from distributed.config.leaves import Leaf, leaves
from distributed.config.train_config import TrainConfig

HEAD = """\
usage: python -m distributed.train [CONFIG.toml] [--SETTING VALUE ...] [--dry-run]
       torchrun --nproc_per_node=N -m distributed.train [CONFIG.toml] [--SETTING VALUE ...] [--dry-run]

Train an AlexNet variant, or a network of your own, on CIFAR, a folder of images or arrays of your own. CONFIG.toml is a
file or the name of a shipped config, e.g. cifar10 or seeds/I-10 (an unknown name lists all of them). Without arguments it
trains improved_alexnet on CIFAR-10 if that is in ./data, else on generated images; a cluster job must name its data. The
same command resumes a stopped or killed run; settings marked * may then change. With --dry-run it loads the data and the
network, takes eight steps, prints memory, speed and the time to finish, and leaves the run folder alone.
"""
_COLUMN = 39  # where descriptions begin
_UNBOUND = 10_000


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return "none" if value is None else str(value)


def _variants(path: str) -> list[Leaf]:
    return [leaf for leaf in leaves() if leaf.path == path]


def _group(leaf: Leaf) -> str:
    """Return a setting's heading: its section, and the variants that have it if not all do."""
    section = leaf.path.rpartition(".")[0]
    owners = [variant.variant for variant in _variants(leaf.path) if variant.variant]
    everywhere = {variant.variant for variant in _variants(f"{section.partition('.')[0]}.name") if variant.variant}
    return section if set(owners) == everywhere else f"{section}, with name = {' or '.join(owners)}"


def _lines(leaf: Leaf, width: int) -> str:
    variants = _variants(leaf.path)
    if leaf.path.endswith(".name") and len(variants) > 1:
        default = TrainConfig.model_fields[leaf.path.partition(".")[0]].default.name
        lines = [f"{variant.choices}: {variant.doc}" for variant in variants]
        lines[-1] += f"  (default {default})"
    elif len({(variant.doc, str(variant.default)) for variant in variants}) > 1:
        lines = [f"{variant.variant}: {_described(variant)}" for variant in variants]
    else:
        lines = [_described(leaf)]
    option = f"--{leaf.path}{' *' if leaf.operational else ''}"
    column = " " * _COLUMN
    lines = [
        wrapped
        for line in lines
        for wrapped in textwrap.wrap(line, max(40, width - _COLUMN), subsequent_indent="  ", break_on_hyphens=False)
    ]
    return f"    {option:<34} " + f"\n{column}".join(lines)


def _described(leaf: Leaf) -> str:
    return f"{leaf.doc}  [{leaf.choices}]  (default {_default(leaf.default)})"


def help_text(width: int | None = None) -> str:
    """Return all settings, grouped by section, with type and default.

    Args:
        width: in characters; by default the terminal's, and unlimited without a terminal, so that grep finds entire lines.
    """
    width = width or shutil.get_terminal_size((_UNBOUND, 0)).columns
    groups: dict[str, list[str]] = {}
    first_of = {leaf.path: leaf for leaf in reversed(leaves())}
    for path in dict.fromkeys(leaf.path for leaf in leaves()):
        leaf = first_of[path]
        groups.setdefault(_group(leaf), []).append(_lines(leaf, width))
    return "\n".join(
        [HEAD, "settings:", *["\n".join([f"\n  {group}" if group else "", *lines]) for group, lines in groups.items()]]
    )
