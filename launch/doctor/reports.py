"""The report of one node, and how it is passed through srun's output. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Strict, ValidationError

_MARK = "doctor-report:"
_FRAGMENT = 600  # characters; srun forwards at most 1,024 bytes at a time, and interleaves nodes


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Devices(_Section):
    """Number, name and memory of the GPUs; cores and memory of the host."""

    gpus: int
    gpu_memory_gib: float
    """Memory of the smallest GPU; 0 without GPUs."""
    cores: int
    memory_gib: float


class Folder(_Section):
    """The run folder as this node sees it."""

    path: str
    sees_token: bool
    """Whether this node sees the file that the doctor wrote there."""
    writable: bool
    free_gib: float


class Network(_Section):
    """What this node measured together with the others."""

    present: list[int]
    """Indices of the nodes that reached the rendezvous in time."""
    sum_is_right: bool = True
    gib_per_second: dict[Annotated[int, Strict(False)], float] = {}
    """Speed to each other node, by index; 0 if not measured, negative if wrong bytes arrived."""
    clock_seconds: float | None = None
    """How far this clock is ahead of the first node's."""


class NodeReport(_Section):
    """Everything that one node measured; a section that failed is None and has an entry in `errors`."""

    node: str
    index: int
    versions: dict[str, str] | None = None
    code: str | None = None
    """Digest of the project's source files."""
    model: str | None = None
    """Digest of the files of the modules that the config names, e.g. the network's; `built in` without any."""
    data: str | None = None
    devices: Devices | None = None
    folder: Folder | None = None
    network: Network | None = None
    errors: dict[str, str] = {}

    def error(self, section: str) -> str:
        """Return why a section is missing; empty if it is not."""
        return self.errors.get(section, "" if getattr(self, section) is not None else "it is missing from its report")

    @classmethod
    def parse(cls, text: str, node: str, index: int) -> Self:
        """Read a report from JSON. A malformed section becomes an error of that section.

        Raises:
            ValueError: the text is not a report at all.
        """
        report = json.loads(text)
        if not isinstance(report, dict):
            raise ValueError("a report is an object")
        report |= {"node": node, "index": index}
        try:
            return cls.model_validate(report)
        except ValidationError as error:
            malformed = _malformed_sections(error)
        errors = report.get("errors") if "errors" not in malformed else None
        return cls.model_validate(report | dict.fromkeys(malformed) | {"errors": {**(errors or {}), **malformed}})


def _malformed_sections(error: ValidationError) -> dict[str, str]:
    """Return the error of each malformed section, by name."""
    fields: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for mistake in error.errors():
        section, *inner = map(str, mistake["loc"])
        fields.setdefault(section, []).extend(inner[:1])
        values[section] = mistake["input"]
    return {
        section: f"its report has no usable {', '.join(dict.fromkeys(names))}"
        if names
        else f"its report has {str(values[section])[:60]!r} there"
        for section, names in fields.items()
    }


@dataclass
class Answers:
    """The reports that arrived, by node, and the reason for each node without one."""

    reports: dict[str, NodeReport] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


def to_lines(report: NodeReport) -> str:
    """Write a report as short lines, each with the node's name, its number and the number of lines."""
    text = json.dumps(report.model_dump(mode="json"))
    fragments = [text[begin : begin + _FRAGMENT] for begin in range(0, len(text), _FRAGMENT)]
    return "".join(
        f"{_MARK}{report.node} {number}/{len(fragments)} {fragment}\n" for number, fragment in enumerate(fragments, 1)
    )


def read_reports(printed: str, nodes: Sequence[str]) -> Answers:
    """Find the reports among everything that the nodes printed."""
    answers, fragments = Answers(), dict[str, dict[str, str]]()
    for line in printed.splitlines():
        node, number, fragment = [*line.partition(_MARK)[2].split(" ", 2), "", ""][:3]
        if node in nodes:
            fragments.setdefault(node, {})[number] = fragment
    for node, found in fragments.items():
        count = next(iter(found)).partition("/")[2]
        try:
            text = "".join(found[f"{number}/{count}"] for number in range(1, int(count) + 1))
            answers.reports[node] = NodeReport.parse(text, node, nodes.index(node))
        except (KeyError, ValueError, RecursionError):
            answers.silent[node] = f"its report cannot be read: {' '.join(found.values())[:80]!r}"
    return answers
