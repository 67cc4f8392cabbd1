"""Collects the reports of `launch.doctor.probe` from all nodes through srun, and validates them.

Imports no torch.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from distributed.errors import InputError

Report = dict[str, Any]
_MARK = "doctor-report:"
_FRAGMENT = 600  # characters; srun passes on at most 1,024 bytes at a time, those of several nodes in any order
_AT_ONCE = 16
_NUMBER = (int, float)
_FIELDS: dict[str, dict[str, Any]] = {
    "versions": {},
    "devices": {"gpus": int, "gpu_memory_gib": _NUMBER, "cores": int, "memory_gib": _NUMBER},
    "folder": {"path": str, "sees_token": bool, "writable": bool, "free_gib": _NUMBER},
}


@dataclass
class Answers:
    """The reports that came, by node, and why there is none of the other nodes."""

    reports: dict[str, Report] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


def lines_of(report: Report) -> str:
    """A report as short lines, each with the node's name and its place among them."""
    text = json.dumps(report)
    parts = [text[begin : begin + _FRAGMENT] for begin in range(0, len(text), _FRAGMENT)]
    return "".join(f"{_MARK}{report['node']} {number}/{len(parts)} {part}\n" for number, part in enumerate(parts, 1))


def read(out: str, nodes: Sequence[str]) -> Answers:
    """The reports among what the nodes printed; all else there is ignored."""
    answers, parts = Answers(), dict[str, dict[str, str]]()
    for line in out.splitlines():
        node, place, part = [*line.partition(_MARK)[2].split(" ", 2), "", ""][:3]
        if node in nodes:
            parts.setdefault(node, {})[place] = part
    for node, found in parts.items():
        count = next(iter(found)).partition("/")[2]
        try:
            text = "".join(found[f"{number}/{count}"] for number in range(1, int(count) + 1))
            answers.reports[node] = _checked(json.loads(text), node, nodes.index(node))
        except (KeyError, ValueError, RecursionError):
            answers.silent[node] = f"its report cannot be read: {' '.join(found.values())[:80]!r}"
    return answers


def _checked(report: Any, node: str, index: int) -> Report:
    """The report with every part that the verdict reads; a part of another form becomes an error of that part.

    Raises:
        ValueError: it is no report at all.
    """
    if not isinstance(report, dict):
        raise ValueError
    checked: Report = {"node": node, "index": index, "code": report.get("code"), "data": report.get("data")}
    for part in ("code", "data"):
        if not isinstance(checked[part], str):
            checked[part] = _part(checked[part], {"error": str})
    for part, fields in _FIELDS.items():
        checked[part] = _part(report.get(part), fields)
    if "network" in report:
        checked["network"] = _part(report["network"], {"met": list})
        speeds = checked["network"].setdefault("gib_per_second", {})
        clock = checked["network"].get("clock_seconds", 0.0)
        if not isinstance(clock, _NUMBER) or not isinstance(speeds, dict) or not all(map(_is_speed, speeds.items())):
            checked["network"] = {"error": "its report has no numbers there"}
    return checked


def _part(part: Any, fields: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(part, dict):
        return {"error": f"its report has {str(part)[:60]!r} there"}
    if "error" in part:
        return {"error": str(part["error"])}
    missing = [name for name, kind in fields.items() if not isinstance(part.get(name), kind)]
    return {"error": f"its report has no usable {', '.join(missing)}"} if missing else part


def _is_speed(entry: tuple[str, Any]) -> bool:
    return entry[0].isdecimal() and isinstance(entry[1], _NUMBER)


def of_this_machine(words: Iterable[str], node: str, *, seconds: float) -> Answers:
    """The report of this machine, without Slurm."""
    out, problem = bounded([*_probe(words)], 3 * seconds + 30)
    return _with_reasons(read(out, [node]), [node], problem)


def of_nodes(words: Sequence[str], nodes: Sequence[str], *, seconds: float) -> Answers:
    """The reports of the job's nodes, all at once, so that they can meet.

    srun starts nothing anywhere if one node cannot be reached: the nodes that are silent then are asked once more, each alone.
    """
    step = ["srun", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=0"]
    together = [*step, f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", f"--wait={2 * seconds + 10:.0f}"]
    out, problem = bounded([*together, *_probe(words)], 3 * seconds + 30)
    answers = _with_reasons(read(out, nodes), nodes, problem)
    if answers.silent and len(nodes) > 1:
        silent, first = sorted(answers.silent, key=nodes.index), dict(answers.silent)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            alone = [
                pool.submit(bounded, [*step, "--nodes=1", "--ntasks=1", f"--nodelist={node}", *_probe(words)],
                            seconds + 30)
                for node in silent
            ]  # fmt: skip
        for node, asked in zip(silent, alone, strict=True):
            out, problem = asked.result()
            again = _with_reasons(read(out, [node]), [node], problem or answers.silent[node])
            for report in again.reports.values():
                report["index"] = nodes.index(node)
                answers.reports[node] = report
                del answers.silent[node]
            answers.silent |= again.silent
        if not answers.silent:  # each answers alone, so what failed is what they do together
            for node in silent:
                answers.reports[node]["network"] = {
                    "error": f"no answer when all nodes were tested together: {first[node]}"
                }
    return answers


def _probe(words: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", "launch.doctor.probe", *words]


def _with_reasons(answers: Answers, nodes: Sequence[str], problem: str) -> Answers:
    for node in nodes:
        if node not in answers.reports:
            answers.silent.setdefault(node, problem or "it printed no report")
    return answers


def bounded(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """What a command printed, and in one line why it failed or had to be ended; "" if it did not.

    Raises:
        InputError: it cannot be started.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:  # a pipe could be held open by a child
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        except OSError as error:
            raise InputError(f"{command[0]}: {error.strerror}; start this on a node of the job, where it is") from None
        late = False
        for end in (process.terminate, process.kill):  # srun ends its tasks on SIGTERM
            try:
                process.wait(10 if late else seconds)
                break
            except subprocess.TimeoutExpired:
                late = True
                end()
        else:
            process.wait()
        printed, said = (_text(file) for file in (out, errors))
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = next((line for mark in (" failed on node ", "error:", "") for line in lines if mark in line), "")
    if late:
        return printed, f"no end after {seconds:g} s{f': {reason[:300]}' if reason else ''}"
    return printed, (reason[:300] or f"exit code {process.returncode}") if process.returncode else ""


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))
