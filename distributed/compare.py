"""`python -m distributed.compare RUN RUN`: are two runs bit-identical? If not, where do they diverge, and what differs?

Compares every logged metric, and the digest of every tensor at every step that both runs saved.
"""

from dataclasses import dataclass
from typing import Any

from distributed.config import TrainConfig, differences, toml_value
from distributed.config.layers import shown
from distributed.errors import ExitCode, InputError, counted, prints_errors
from distributed.files import home_path
from distributed.inference.saved_run import read_config
from distributed.process.arguments import OneLineParser
from distributed.process.streams import run_command
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import MACHINE_METRICS, TrainRecord, read_metrics
from distributed.run.records import read_attempts, read_saves
from distributed.runs.outcome import outcome_of
from distributed.runs.table import HEADINGS, cells, in_columns, number


@dataclass(frozen=True, order=True)
class Divergence:
    """A difference between two runs, which arose within the first `step` steps."""

    step: int
    description: str


@dataclass(frozen=True)
class Comparison:
    """The first divergence in the logs and the first in the saved tensors, earlier step first.

    `logged` and `saves` count the lines of metrics and the saved states that both runs have.
    """

    divergences: list[Divergence]
    logged: int
    saves: int

    @property
    def extent(self) -> str:
        """Describe how much was compared."""
        lines, states = counted(self.logged, "logged line"), counted(self.saves, "saved state")
        return f"{lines} and {states} in common"


class Recorded:
    """What a run has recorded: metrics by (step, place), and digests of tensors by the name of the save."""

    def __init__(self, run: RunFolder) -> None:
        self.logged, self.saved = _logged(run), _saved(run)

    def compare(self, other: "Recorded") -> Comparison:
        """Compare the logged metrics and saved tensors that both runs have."""
        lines, others = self.logged, other.logged
        common = [key for key in lines if key in others]
        found = [divergence for key in common if (divergence := _compare_lines(key, lines[key], others[key]))][:1]
        saves = [name for name in self.saved if name in other.saved]
        differing = (_compare_saves(name, self.saved[name], other.saved[name]) for name in saves)
        found += [divergence for divergence in differing if divergence][:1]
        return Comparison(sorted(found), len(common), len(saves))


def compare(a: RunFolder, b: RunFolder) -> Comparison:
    """Compare the logged metrics and saved tensors that both runs have."""
    return Recorded(a).compare(Recorded(b))


def _logged(run: RunFolder) -> dict[tuple[int, str], dict[str, Any]]:
    """Return the metrics of each line by (step, place). A mean over steps is comparable only to one over the same steps."""
    lines, before = {}, 0
    for record in read_metrics(run.metrics_file):
        place = f"steps {before + 1} to {record.step}" if isinstance(record, TrainRecord) else record.kind
        before = record.step
        lines[record.step, place] = record.model_dump(exclude_unset=True, exclude=MACHINE_METRICS)
    return dict(sorted(lines.items()))


def _saved(run: RunFolder) -> dict[str, dict[str, str]]:
    """Return the tensors' digests by the name of the save. If a save is repeated, the last one counts."""
    saved = {record.name: record.tensors for record in read_saves(run.digests_file)}
    return {name: saved[name] for name in sorted(saved)}


def _compare_lines(key: tuple[int, str], a: dict[str, Any], b: dict[str, Any]) -> Divergence | None:
    step, place = key
    for name in a:
        if name in ("validation", "test") and None in (a[name], b.get(name)):
            continue  # not evaluated by both: evaluation.test_every_epoch
        if name in b and not _is_equal(a[name], b[name]):  # versions differ in which metrics they log
            where = f"epoch {a['epoch'] + 1}" if place == "epoch" else place
            return Divergence(step, f"logged for {where}: {name} {a[name]} | {b[name]}")
    return None


def _is_equal(a: Any, b: Any) -> bool:
    """Whether a metric is equal in two runs; of a split's metrics, those that both runs logged."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(a[name] == b[name] for name in a.keys() & b.keys())
    return bool(a == b)


def _compare_saves(name: str, a: dict[str, str], b: dict[str, str]) -> Divergence | None:
    different = [tensor for tensor in {**a, **b} if a.get(tensor) != b.get(tensor)]
    if not different:
        return None
    step = int(name.split("-")[1])
    others = f" and {counted(len(different) - 1, 'other tensor')} of {len(a)}" if different[1:] else ""
    return Divergence(step, f"saved after step {step}: {different[0]}{others}")


def differing_conditions(a: RunFolder, b: RunFolder) -> list[str]:
    """Return a line per setting, version, variable or machine property that differs between two runs."""
    config_a, config_b = _config_of(a), _config_of(b)
    lines = []
    if config_a and config_b:
        changed = [change for change in differences(config_a, config_b) if change[0] != "run_dir"]
        lines += [f"config: {path} = {toml_value(old)} | {toml_value(new)}" for path, old, new in changed]
    conditions_a, conditions_b = _conditions(a), _conditions(b)
    for name in {**conditions_a, **conditions_b}:
        absent = ["not set"] if name.isupper() else []  # an environment variable
        old, new = conditions_a.get(name, absent), conditions_b.get(name, absent)
        if old != new:
            lines.append(f"{name}: {', '.join(old) or '?'} | {', '.join(new) or '?'}")
    return lines


def _config_of(run: RunFolder) -> TrainConfig | None:
    """Return the config that the newest checkpoint was saved under; without one, that of the newest attempt."""
    return run.saved_config() or (read_config(run.path) if run.config_file.is_file() else None)


def _conditions(run: RunFolder) -> dict[str, list[str]]:
    """Return the values of each condition over the attempts that started, in order, without repetitions."""
    conditions: dict[str, list[str]] = {}
    lines = [line for line in read_attempts(run.attempts_file) if line.event == "started"]
    lines = [line for line in lines if line.bits is not None and line.world_size is not None]
    variables = {name for line in lines for name in line.bits or {} if name.isupper()}
    for line in lines:
        bits = dict.fromkeys(sorted(variables), "not set") | (line.bits or {})
        versions = {f"version of {package}": version for package, version in bits.pop("versions", {}).items()}
        code = {"commit": line.git} if line.git else {}
        data = {f"{split} images": _format_identity(images) for split, images in (line.images or {}).items()}
        for name, value in {"world_size": line.world_size, **bits, **versions, **code, **data}.items():
            values = conditions.setdefault(name, [])
            if str(value) not in values[-1:]:
                values.append(str(value))
    return conditions


def _format_identity(images: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in images.items() if value != "")


@prints_errors
def main() -> int:
    """Return the exit code: 0 if the runs are bit-identical, 1 if not, 2 if there is nothing to compare."""
    parser = OneLineParser(prog="python -m distributed.compare", description=__doc__)
    parser.add_argument("runs", nargs=2, type=home_path, metavar="RUN", help="run folder")
    a, b = (RunFolder(path) for path in parser.parse_args().runs)
    return _print_comparison(a, b)


def _print_comparison(a: RunFolder, b: RunFolder) -> int:
    for run in (a, b):
        read_config(run.path)
    found = compare(a, b)
    if not found.saves and not found.logged:
        raise InputError(
            f"{a.path} and {b.path} have no saved state and no logged step in common; train both for longer"
        )
    if not found.divergences:
        print(f"bit-identical: {a.path} and {b.path}, {found.extent}", *_results(a, b), sep="\n")
        return ExitCode.FINISHED
    conditions = differing_conditions(a, b) or ["no difference in config, versions and machine"]
    print(f"not bit-identical: {a.path} and {b.path}, {found.extent}")
    for divergence in found.divergences:
        print(f"  diverged by step {divergence.step}: {divergence.description}")
    print(*(f"  {line}" for line in conditions), sep="\n")
    print(*_results(a, b), sep="\n")
    return ExitCode.FAILED


def _results(a: RunFolder, b: RunFolder) -> list[str]:
    """Return a table of both runs' results."""
    outcomes = [outcome_of(run.path) for run in (a, b)]
    further = list(dict.fromkeys(name for outcome in outcomes for name in outcome.further))
    headings = ["", *HEADINGS, *(f"test {name}" for name in further)]
    columns = [
        [shown(run.path), *cells(outcome), *(number(outcome.further.get(name)) for name in further)]
        for run, outcome in zip((a, b), outcomes, strict=True)
    ]
    return ["", *in_columns(list(zip(headings, *columns, strict=True)))]


if __name__ == "__main__":
    run_command(main)
