"""`python -m distributed.gpu_check [--device cpu --tiny] [--only STEP ...]`: checks correctness and speed on this GPU.

Each step runs in a process of its own with its own time limit, and its result is appended to OUT/gpu_check.jsonl at once, as
one JSON line. A step that fails, crashes or times out does not stop the next. The exit code is 0 if all passed, else 1.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import home_path
from distributed.gpu_check.records import StepResult, checks_in
from distributed.gpu_check.steps import STEPS, Step
from distributed.process.arguments import OneLineParser
from distributed.process.output_file import check_writable
from distributed.process.session import run_in_session
from distributed.process.streams import run_command


@prints_errors
def main(steps: Sequence[Step] = STEPS) -> int:
    """Run the chosen steps. Print a line per check and a summary."""
    parser = OneLineParser(prog="python -m distributed.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use small shapes, to test the checks themselves on a CPU")
    parser.add_argument(
        "--seconds", type=float, default=sum(step.seconds for step in steps),
        help="total time limit; a step still running then is killed; default: those of the steps, %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=home_path, default=Path("runs/gpu_check"), help="folder for gpu_check.jsonl and logs"
    )
    parser.add_argument("--only", nargs="+", choices=[step.name for step in steps], metavar="STEP")
    arguments = parser.parse_args()
    lines = arguments.out / "gpu_check.jsonl"
    check_writable("--out", lines)
    if arguments.device == "cuda":
        _check_cuda()
    deadline = time.monotonic() + arguments.seconds
    results = []
    for step in steps:
        if arguments.only and step.name not in arguments.only:
            continue
        result = run_step(step, arguments.device, tiny=arguments.tiny, out=arguments.out, deadline=deadline)
        with lines.open("a") as file:
            file.write(result.to_line() + "\n")
        results.append(result)
        print(result.summary(), flush=True)
    failed = [result.step for result in results if result.verdict != "pass"]
    print(
        f"{len(results) - len(failed)} of {len(results)} steps passed"
        + (f"; see {', '.join(failed)}" if failed else "")
    )
    return ExitCode.FAILED if failed else ExitCode.FINISHED


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible; check nvidia-smi, or try --device cpu --tiny")


def run_step(step: Step, device: str, *, tiny: bool, out: Path, deadline: float) -> StepResult:
    """Run a step in a process of its own. Its result has every check it printed, however it ended.

    Args:
        out: folder for its log.
        deadline: `time.monotonic()` value at which it is killed.
    """
    start, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S")
    limit = min(step.seconds, deadline - start)
    if limit <= 0:
        message = "not started: the time limit --seconds is reached"
        return StepResult(step.name, device, started, "timeout", 0, exit_code=None, message=message, tiny=tiny)
    log = out / f"{step.name}.log"
    # The step's scratch folder is removed here, since a step that is killed cannot remove it.
    with (
        log.open("wb") as file,
        tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch,
    ):
        command = [
            sys.executable, "-m", "distributed.gpu_check.steps",
            step.module, device, str(int(tiny)), str(out.resolve()), scratch,
        ]  # fmt: skip
        code = run_in_session(command, limit, stdout=file, stderr=file)
    output = log.read_text(errors="replace")
    checks = tuple(checks_in(output))
    seconds = round(time.monotonic() - start, 1)
    if code is None:
        return StepResult(step.name, device, started, "timeout", seconds, checks, code, output[-2000:], tiny)
    if code:
        return StepResult(step.name, device, started, "error", seconds, checks, code, output[-2000:], tiny)
    passed = all(check.verdict == "pass" for check in checks)
    return StepResult(step.name, device, started, "pass" if passed else "fail", seconds, checks, tiny=tiny)


if __name__ == "__main__":
    run_command(main, starts_processes=True)
