"""Collects the reports of `launch.doctor.probe`, from this machine or from all nodes of a job. Imports no torch."""

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from launch.doctor.bounded import run_bounded
from launch.doctor.reports import Answers, read_reports

_PARALLEL = 16
_START_SECONDS = 30  # to start Python on a node
_STEP = ("srun", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=0")


def report_of_this_machine(arguments: Iterable[str], node: str, *, seconds: float) -> Answers:
    """Run the probe here, without Slurm."""
    return _answers(_probe(arguments), [node], 3 * seconds + _START_SECONDS)


def reports_of_job(arguments: Sequence[str], nodes: Sequence[str], *, seconds: float) -> Answers:
    """Run the probe on all nodes of the job at once, so that they can measure the network between them.

    If one node cannot be reached, srun starts nothing on any node, so silent nodes are retried, each alone.
    """
    options = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", f"--wait={2 * seconds + 10:.0f}"]
    answers = _answers([*_STEP, *options, *_probe(arguments)], nodes, 3 * seconds + _START_SECONDS)
    if answers.silent and len(nodes) > 1:
        _retry_alone(answers, arguments, nodes, seconds=seconds)
    return answers


def _retry_alone(answers: Answers, arguments: Sequence[str], nodes: Sequence[str], *, seconds: float) -> None:
    reasons = {node: answers.silent[node] for node in nodes if node in answers.silent}

    def run_alone(node: str) -> Answers:
        options = ["--nodes=1", "--ntasks=1", f"--nodelist={node}"]
        return _answers([*_STEP, *options, *_probe(arguments)], [node], seconds + _START_SECONDS, default=reasons[node])

    with ThreadPoolExecutor(_PARALLEL) as pool:
        retries = list(pool.map(run_alone, reasons))
    for node, retry in zip(reasons, retries, strict=True):
        if report := retry.reports.get(node):
            answers.reports[node] = report.model_copy(update={"index": nodes.index(node)})
            del answers.silent[node]
        answers.silent |= retry.silent
    if not answers.silent:  # each node answers alone, so only the joint test failed
        for node, reason in reasons.items():
            error = f"no answer when all nodes were tested together: {reason}"
            report = answers.reports[node]
            errors = {**report.errors, "network": error}
            answers.reports[node] = report.model_copy(update={"network": None, "errors": errors})


def _probe(arguments: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", "launch.doctor.probe", *arguments]


def _answers(command: Sequence[str], nodes: Sequence[str], seconds: float, *, default: str = "") -> Answers:
    """Run a command that starts probes, and return their reports.

    Args:
        default: the reason for a silent node if the command itself did not fail.
    """
    printed, problem = run_bounded(command, seconds)
    answers = read_reports(printed, nodes)
    for node in nodes:
        if node not in answers.reports:
            answers.silent.setdefault(node, problem or default or "it printed no report")
    return answers
