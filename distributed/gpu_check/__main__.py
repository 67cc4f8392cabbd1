"""`python -m distributed.gpu_check [--device cpu --tiny] [--only STEP ...]`: checks correctness and speed on this GPU.

Each step runs in a process of its own with its own time limit, and its result is appended to OUT/gpu_check.jsonl at once, as
one JSON line. A step that fails, crashes or times out does not stop the next. The exit code is 0 if all passed, else 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed.errors import ExitCode
from distributed.files import check_writable, home_path
from distributed.gpu_check.steps import STEPS, Step
from distributed.process.streams import run_command

_PREFIX = "CHECK "  # as in checks.py, which imports torch


def main(steps: Sequence[Step] = STEPS) -> int:
    """Run the chosen steps. Print a line per check and a summary."""
    parser = argparse.ArgumentParser(prog="python -m distributed.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use small shapes, to test the checks themselves on a CPU")
    parser.add_argument("--seconds", type=float, default=300, help="total time limit; a step that still runs is killed")
    parser.add_argument(
        "--out", type=home_path, default=Path("runs/gpu_check"), help="folder for gpu_check.jsonl and logs"
    )
    parser.add_argument("--only", nargs="+", choices=[step.name for step in steps], metavar="STEP")
    arguments = parser.parse_args()
    lines = arguments.out / "gpu_check.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    check_writable("--out", lines)
    deadline = time.monotonic() + arguments.seconds
    results = []
    for step in steps:
        if arguments.only and step.name not in arguments.only:
            continue
        result = run_step(step, arguments.device, tiny=arguments.tiny, out=arguments.out, deadline=deadline)
        with lines.open("a") as file:
            file.write(json.dumps(result) + "\n")
        results.append(result)
        print(summary(result), flush=True)
    failed = [result["step"] for result in results if result["verdict"] != "pass"]
    print(
        f"{len(results) - len(failed)} of {len(results)} steps passed"
        + (f"; see {', '.join(failed)}" if failed else "")
    )
    return ExitCode.FAILED if failed else ExitCode.FINISHED


def run_step(step: Step, device: str, *, tiny: bool, out: Path, deadline: float) -> dict[str, Any]:
    """Run a step and return its result: verdict, seconds, and each check it printed, however it ended."""
    start = time.monotonic()
    limit = min(step.seconds, deadline - start)
    result: dict[str, Any] = {"step": step.name, "device": device, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    if limit <= 0:
        return result | {"verdict": "timeout", "seconds": 0, "message": "not started: --seconds are over", "checks": []}
    command = [
        sys.executable, "-m", "distributed.gpu_check.steps", step.module, device, str(int(tiny)), str(out.resolve()),
    ]  # fmt: skip
    log = out / f"{step.name}.log"
    with log.open("wb") as file:
        # A session of its own, so that the ranks a step started end with it.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    text = log.read_text(errors="replace")
    checks = _checks_in(text)
    verdict = "timeout" if code is None else "error" if code else "pass"
    if verdict == "pass" and any(check["verdict"] != "pass" for check in checks):
        verdict = "fail"
    result |= {"verdict": verdict, "seconds": round(time.monotonic() - start, 1), "checks": checks}
    if code != 0:
        result |= {"exit_code": code, "message": text[-2000:]}
    return result


def _checks_in(text: str) -> list[dict[str, Any]]:
    """Return the checks that a step printed. A dying process may cut a line short, or print other text before a check."""
    found = []
    for line in text.splitlines():
        _, prefix, record = line.partition(_PREFIX)
        if prefix and record.startswith("{"):
            with suppress(json.JSONDecodeError):
                found.append(json.loads(record))
    return found


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(result: dict[str, Any]) -> str:
    """Format a result for the terminal: a line for the step, and one per check with its figures or its error."""
    rows = [f"{result['verdict']:7} {result['step']} ({result['seconds']} s)"]
    for check in result["checks"]:
        figures = ", ".join(f"{name} {_short(value)}" for name, value in check["figures"].items())
        rows.append(f"  {check['verdict']:7} {check['check']} ({check['seconds']} s) {figures}")
        if "message" in check:
            rows += [f"          {line}" for line in check["message"].strip().splitlines()[-4:]]
    if result["verdict"] in ("error", "timeout"):
        rows += [f"    {line}" for line in result["message"].strip().splitlines()[-6:]]
    return "\n".join(rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_command(main)
