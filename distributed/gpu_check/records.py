"""The results of checks and steps, and how they are written as JSON lines. Imports no torch."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

_PREFIX = "CHECK "
"""Start of a line with a check's result in the output of a step."""


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Args:
        verdict: `fail` if an assertion failed, `error` after any other exception.
        figures: JSON values by name.
        message: what went wrong; empty if the check passed.
    """

    check: str
    verdict: Literal["pass", "fail", "error"]
    seconds: float
    figures: dict[str, Any]
    message: str = ""

    def to_line(self) -> str:
        """Return the line that a step prints."""
        return _PREFIX + json.dumps({name: value for name, value in asdict(self).items() if name != "message" or value})


def checks_in(output: str) -> list[CheckResult]:
    """Return the checks that a step printed. A dying process may truncate a line, or print other text before a check."""
    found = []
    for line in output.splitlines():
        _, prefix, record = line.partition(_PREFIX)
        if prefix and record.startswith("{"):
            with suppress(json.JSONDecodeError, TypeError):
                found.append(CheckResult(**json.loads(record)))
    return found


@dataclass(frozen=True)
class StepResult:
    """The result of a step, a line of gpu_check.jsonl.

    Args:
        time: when it started, ISO 8601.
        verdict: `fail` if only checks failed, `error` if the process did.
        exit_code: None if the step timed out.
        message: the end of the step's output, unless its exit code is 0.
        tiny: with shapes so small that it shows nothing about a GPU.
    """

    step: str
    device: str
    time: str
    verdict: Literal["pass", "fail", "error", "timeout"]
    seconds: float
    checks: tuple[CheckResult, ...] = ()
    exit_code: int | None = 0
    message: str = ""
    tiny: bool = False

    def to_line(self) -> str:
        fields = asdict(self) | {"checks": [json.loads(one.to_line().removeprefix(_PREFIX)) for one in self.checks]}
        if self.exit_code == 0:
            del fields["exit_code"], fields["message"]
        return json.dumps(fields)

    def summary(self) -> str:
        """Format the result for the terminal: a line for the step, and one per check with its figures or its error."""
        rows = [f"{self.verdict:7} {self.step} ({self.seconds} s)"]
        for check in self.checks:
            figures = ", ".join(f"{name} {_short(value)}" for name, value in check.figures.items())
            rows.append(f"  {check.verdict:7} {check.check} ({check.seconds} s) {figures}")
            rows += [f"          {line}" for line in check.message.strip().splitlines()[-4:]]
        rows += [f"    {line}" for line in self.message.strip().splitlines()[-6:] if _PREFIX not in line]
        return "\n".join(rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
