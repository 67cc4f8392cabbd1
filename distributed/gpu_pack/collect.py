"""Merges the files that a rented machine returned with earlier results in the results folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from distributed.errors import InputError
from distributed.experiments.records import read_results, write_results
from distributed.files import read_json, replace_json
from distributed.gpu_check.steps import STEPS

_MAX_PROFILE_BYTES = 64 * 2**10  # a larger one is not worth committing


def newest_steps(lines: Path) -> dict[str, dict[str, Any]]:
    """Return each step's newest GPU result in a gpu_check.jsonl, in the order of steps.

    Truncated lines are ignored, and steps in tiny shapes.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in lines.read_text(errors="replace").splitlines() if lines.is_file() else ():
        try:
            line = json.loads(text)
            if line["device"] == "cuda" and isinstance(line["verdict"], str) and not line.get("tiny"):
                found[line["step"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return {step.name: found[step.name] for step in STEPS if step.name in found}


def check_passed(lines: Path) -> None:
    """Raise InputError unless every step passed on a GPU when it last ran."""
    found = newest_steps(lines)
    failed = [f"{step.name} ({found[step.name]['verdict'] if step.name in found else 'not run'})" for step in STEPS
           if step.name not in found or found[step.name]["verdict"] != "pass"]  # fmt: skip
    if failed:
        raise InputError(f"{lines}: not passed: {', '.join(failed)}; run make gpu-check, or set UNCHECKED=1")


def collect(source: Path, results: Path) -> list[Path]:
    """Copy or merge the results in `source` into `results`, and return the files written.

    Raises:
        InputError: `source` has no results.
    """
    results.mkdir(parents=True, exist_ok=True)
    written = []
    if steps := newest_steps(source / "gpu_check.jsonl"):
        file = results / "gpu_check.json"
        earlier = {line["step"]: line for line in read_json(file) or []}
        merged = earlier | {name: _without_paths(line) for name, line in steps.items()}
        replace_json(file, [merged[step.name] for step in STEPS if step.name in merged])
        written.append(file)
    if (speed := source / "bench_train_gpu.json").is_file():
        written.append(Path(shutil.copyfile(speed, results / speed.name)))
    if _is_of_gpu(speed := source / "gpu_speed.json"):
        written.append(Path(shutil.copyfile(speed, results / speed.name)))
        if (profile := source / "profile.txt").is_file() and profile.stat().st_size <= _MAX_PROFILE_BYTES:
            written.append(Path(shutil.copyfile(profile, results / "gpu_profile.txt")))
    if (returned := source / "results.json").is_file():
        write_results(read_results(returned), results / "results.json")
        written.append(results / "results.json")
    if not written:
        raise InputError(
            f"{source}: contains no results: no gpu_check.jsonl, gpu_speed.json, bench_train_gpu.json or results.json"
        )
    return written


def _is_of_gpu(speed: Path) -> bool:
    """Whether the step `speed` has measured a GPU, in shapes that say something about it."""
    found = read_json(speed) if speed.is_file() else None
    return isinstance(found, dict) and found.get("card") != "cpu" and not found.get("tiny")


def _without_paths(line: dict[str, Any]) -> dict[str, Any]:
    """Return the result with only the last line of each message, since tracebacks name files of the machine."""
    short = {key: value for key, value in line.items() if key not in ("message", "checks")}
    if "message" in line:
        short["message"] = _last(line["message"])
    checks = [check | ({"message": _last(check["message"])} if "message" in check else {}) for check in line["checks"]]
    return short | {"checks": checks}


def _last(message: str) -> str:
    return (message.strip().splitlines() or [""])[-1]
