"""`python -m distributed.compare RUN RUN`: whether two runs are the same bits, else where they part and what differed.

Compared are all logged figures and the digests of every tensor at every save that both runs made. Imports no torch.
"""

import argparse
import os
from dataclasses import dataclass
from typing import Any

from distributed.config import differences, toml_value
from distributed.config.layers import shown
from distributed.errors import ExitCode, InputError
from distributed.files import home_path
from distributed.process.streams import run_command
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import TrainRecord, read_metrics
from distributed.run.records import read_attempts, read_saves
from distributed.runs.outcome import outcome_of
from distributed.runs.table import HEADINGS, cells, in_columns

_OF_THE_MACHINE = {"images_per_second", "data_wait", "memory_mib", "eta_seconds", "seconds"}


@dataclass(frozen=True, order=True)
class Parting:
    """Where two runs are found to differ: at the latest after `step` steps; in words."""

    step: int
    where: str


@dataclass(frozen=True)
class Comparison:
    """The first difference of each kind, if any; how much was compared."""

    partings: list[Parting]
    figures: int
    saves: int


def compare(a: RunFolder, b: RunFolder) -> Comparison:
    """Logged figures and saved tensors that both runs have, from the first step on."""
    logged_a, logged_b = _logged(a), _logged(b)
    both = [key for key in logged_a if key in logged_b]
    found = [parting for key in both if (parting := _parting_of_lines(key, logged_a[key], logged_b[key]))][:1]
    saved_a, saved_b = _saved(a), _saved(b)
    saves = [name for name in saved_a if name in saved_b]
    found += [parting for name in saves if (parting := _parting_of_saves(name, saved_a[name], saved_b[name]))][:1]
    return Comparison(sorted(found), len(both), len(saves))


def _logged(run: RunFolder) -> dict[tuple[int, str], dict[str, Any]]:
    """(step, kind) -> the figures of that line. A window of steps is compared with the same window only."""
    lines, before = {}, 0
    for record in read_metrics(run.metrics_file):
        kind = f"steps {before + 1} to {record.step}" if isinstance(record, TrainRecord) else record.kind
        before = record.step
        lines[record.step, kind] = record.model_dump(exclude_unset=True, exclude=_OF_THE_MACHINE)
    return dict(sorted(lines.items()))


def _saved(run: RunFolder) -> dict[str, dict[str, str]]:
    saved = {
        record.name: record.tensors for record in read_saves(run.digests_file)
    }  # of one made twice the last counts
    return {name: saved[name] for name in sorted(saved)}


def _parting_of_lines(key: tuple[int, str], a: dict[str, Any], b: dict[str, Any]) -> Parting | None:
    step, kind = key
    for name in a:
        if name in b and a[name] != b[name]:  # versions differ in what they log
            place = f"epoch {a['epoch'] + 1}" if kind == "epoch" else kind
            return Parting(step, f"logged of {place}: {name} {a[name]} | {b[name]}")
    return None


def _parting_of_saves(name: str, a: dict[str, str], b: dict[str, str]) -> Parting | None:
    different = [tensor for tensor in {**a, **b} if a.get(tensor) != b.get(tensor)]
    if not different:
        return None
    others = f" and {len(different) - 1} other tensors of {len(a)}" if different[1:] else ""
    return Parting(int(name.split("-")[1]), f"saved after step {int(name.split('-')[1])}: {different[0]}{others}")


def circumstances(a: RunFolder, b: RunFolder) -> list[str]:
    """What differed between the runs besides their bits, a line each: config, then what each attempt ran on."""
    config_a, config_b = a.saved_config(), b.saved_config()
    lines = []
    if config_a and config_b:
        changed = [change for change in differences(config_a, config_b) if change[0] != "run_dir"]
        lines += [f"config: {path} = {toml_value(old)} | {toml_value(new)}" for path, old, new in changed]
    facts_a, facts_b = _facts(a), _facts(b)
    for name in {**facts_a, **facts_b}:
        absent = ["not set"] if name.isupper() else []  # a variable of the environment
        old, new = facts_a.get(name, absent), facts_b.get(name, absent)
        if old != new:
            lines.append(f"{name}: {', '.join(old) or '?'} | {', '.join(new) or '?'}")
    return lines


def _facts(run: RunFolder) -> dict[str, list[str]]:
    """What each attempt that was begun ran on, in their order; what stayed the same is named once."""
    facts: dict[str, list[str]] = {}
    lines = [line for line in read_attempts(run.attempts_file) if line.event == "started"]
    lines = [line for line in lines if line.bits is not None and line.world_size is not None]
    variables = {name for line in lines for name in line.bits or {} if name.isupper()}
    for line in lines:
        bits = dict.fromkeys(sorted(variables), "not set") | (line.bits or {})
        versions = {f"version of {package}": version for package, version in bits.pop("versions", {}).items()}
        code = {"commit": line.git} if line.git else {}
        data = {f"{split} images": _in_words(identity) for split, identity in (line.images or {}).items()}
        for name, value in {"world_size": line.world_size, **bits, **versions, **code, **data}.items():
            told = facts.setdefault(name, [])
            if str(value) not in told[-1:]:
                told.append(str(value))
    return facts


def _in_words(identity: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value != "")


def main() -> int:
    """0: the same bits; 1: not; 2: nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m distributed.compare", description=__doc__)
    parser.add_argument("runs", nargs=2, type=home_path, metavar="RUN", help="folder of a run")
    a, b = (RunFolder(path) for path in parser.parse_args().runs)
    try:
        return _tell(a, b)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT


def _tell(a: RunFolder, b: RunFolder) -> int:
    for run in (a, b):
        if not os.path.isfile(run.config_file):
            raise InputError(
                f"{run.path}: no config.toml there; RUN is the folder that a training run wrote (its --run_dir)"
            )
    found = compare(a, b)
    if not found.saves and not found.figures:
        raise InputError(f"{a.path} and {b.path} have no save and no logged step in common; train both for longer")
    extent = f"{found.figures} logged lines and {found.saves} saved states in common"
    if not found.partings:
        print(f"the same bits: {a.path} and {b.path}, {extent}", *_results(a, b), sep="\n")
        return ExitCode.FINISHED
    print(f"not the same bits: {a.path} and {b.path}, {extent}")
    for parting in found.partings:
        print(f"  parted by step {parting.step}: {parting.where}")
    for line in circumstances(a, b) or ["nothing differed in config, versions and machine"]:
        print(f"  {line}")
    print(*_results(a, b), sep="\n")
    return ExitCode.FAILED


def _results(a: RunFolder, b: RunFolder) -> list[str]:
    """What each run reached, side by side."""
    columns = [[shown(run.path), *cells(outcome_of(run.path))] for run in (a, b)]
    return ["", *in_columns(list(zip(("", *HEADINGS), *columns, strict=True)))]


if __name__ == "__main__":
    run_command(main)
