"""`python -m distributed.bench train | exact | scaling | engines | startup | save | norm`: measures speed in rounds that
interleave all workloads.
`python -m distributed.bench accuracy`: measures the seconds of training until a network reaches test accuracies, here and
with timm.
`python -m distributed.bench memory`: measures the memory a rank needs under each engine.
`python -m distributed.bench page`: writes the figures of docs/benchmarks.md from the files in results/."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distributed.bench import accuracy, scaling
from distributed.bench.benchmarks import BENCHMARKS
from distributed.bench.machine import machine
from distributed.bench.memory import measure_all
from distributed.bench.options import NETWORK, WORKLOADS, Options
from distributed.bench.page import write_page
from distributed.bench.peers import DEFAULT_PEERS, PEERS, peer_python
from distributed.bench.rounds import Results, run_rounds, summary
from distributed.bench.scaling_report import PREDICTED_CORES, report
from distributed.data.sources import cifar
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import home_path
from distributed.process.arguments import OneLineParser
from distributed.process.optional_output import requested_output
from distributed.process.output_file import check_writable
from distributed.process.streams import run_command


@prints_errors
def main() -> int:
    """Run the rounds, print medians and ratios, and write them as JSON on request. Return 1 if a workload failed."""
    arguments = _parser().parse_args()
    if arguments.benchmark in ("page", "memory"):
        _check_alone(arguments)
        if arguments.benchmark == "page":
            print(write_page())
        else:
            measure_all(arguments.json)
        return ExitCode.FINISHED
    options = Options.of(arguments)
    if arguments.benchmark == "accuracy":
        return accuracy.measure(arguments, options)
    if arguments.from_file and arguments.json:
        raise InputError("--from: measures nothing, so --json has nothing to write; leave one of them out")
    if arguments.from_file:
        print(_report(_read(arguments.from_file), arguments.cores))
        return ExitCode.FINISHED
    if arguments.benchmark != "norm":
        cifar.check("cifar10", options.root)
    if arguments.json:
        check_writable("--json", arguments.json)
    if arguments.benchmark == "train" and options.peers and options.chosen_peers:
        options = replace(options, peer_python=peer_python(options.peers, options.chosen_peers))
    results = _measure(arguments, options)
    if arguments.benchmark == "scaling":
        cores = results.machine["cores"]
        results.model = scaling.content(results.rounds, cores=cores, predicted_cores=arguments.cores or PREDICTED_CORES)
        print(_report(asdict(results), arguments.cores))
    else:
        print(summary(BENCHMARKS[arguments.benchmark], results.rounds))
    if arguments.json:
        with requested_output("--json", arguments.json):
            results.write(arguments.json)
    return ExitCode.FAILED if results.outputs else ExitCode.FINISHED


def _check_alone(arguments: argparse.Namespace) -> None:
    """Raise InputError if an option was given that `page` or `memory` does not have."""
    defaults = vars(_parser().parse_args([arguments.benchmark]))
    own = {"json"} if arguments.benchmark == "memory" else set()
    if wrong := [name for name, value in vars(arguments).items() if value != defaults[name] and name not in own]:
        names = {"root": "data.root", "from_file": "from"}
        options = ", ".join(f"--{names.get(name, name)}" for name in wrong)
        raise InputError(f"{options}: {arguments.benchmark} has no such option; leave it out")
    if arguments.json:
        check_writable("--json", arguments.json)


def _read(file: Path) -> dict[str, Any]:
    """Read what --json wrote.

    Raises:
        InputError: it is not such a file.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if any(scaling.name_of("fast", 1) in figures for figures in found["rounds"]):
            return found
    except OSError as error:
        raise InputError(
            f"--from {file}: cannot be read: {error.strerror}; name a file that scaling --json wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"--from {file}: contains no figures of scaling; name a file that scaling --json wrote")


def _report(results: Mapping[str, Any], cores: Sequence[int] | None) -> str:
    measured_cores = results["machine"]["cores"]
    return report(results["rounds"], cores=measured_cores, predicted_cores=cores or PREDICTED_CORES)


def _measure(arguments: argparse.Namespace, options: Options) -> Results:
    results = Results(_command(arguments, options), machine(options.device, peer_python=options.peer_python))
    if arguments.benchmark == "train" and not options.peers:
        results.skipped = dict.fromkeys(PEERS, "--no-peers")
    deadline = time.monotonic() + 60 * arguments.minutes
    rounds = _rounds(arguments, options)
    run_rounds(BENCHMARKS[arguments.benchmark], options, results, rounds=rounds, deadline=deadline, file=arguments.json)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m distributed.bench", description=__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "accuracy", "memory", "page"])
    parser.add_argument("--data.root", dest="root", type=home_path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of all workloads; auto: CUDA if available",
    )
    parser.add_argument("--rounds", type=int, help="default: 5, on CUDA 1")
    parser.add_argument("--steps", type=int, help="steps per workload and round; default: 80, on CUDA 100, scaling 40")
    parser.add_argument("--batches", type=int, nargs="+", help="train: batch sizes; default: 128, on CUDA 128 512 2048")
    names = "; ".join(f"{name}: {meaning}" for name, meaning in WORKLOADS.items())
    parser.add_argument(
        "--workloads", "--contenders", nargs="+", choices=list(WORKLOADS), metavar="NAME",
        help=f"train: run only these. {names}",
    )  # fmt: skip
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument(
        "--peers", type=home_path, metavar="FOLDER", default=DEFAULT_PEERS,
        help="train, accuracy: environment for timm, accelerate and Lightning unless they are installed here; made by the "
        "first run, with pip; default: .venv-bench",
    )  # fmt: skip
    peers.add_argument(
        "--no-peers", dest="peers", action="store_const", const=None, help="train, accuracy: without them"
    )
    parser.add_argument(
        "--network", default=NETWORK, metavar="NAME",
        help=f"exact: model.name, e.g. cifar_alexnet or torchvision.models:resnet18; default: {NETWORK}",
    )  # fmt: skip
    parser.add_argument(
        "--cores", type=int, nargs="+", help="scaling: predict steps on this many cores; default: 2 4 8"
    )
    parser.add_argument(
        "--from", dest="from_file", type=home_path, metavar="JSON",
        help="scaling: measure nothing, and predict from this file, which --json wrote",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, help="time limit per workload, startup included; default: none, on CUDA 40"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="total time limit; workloads that would start later are skipped",
    )
    parser.add_argument(
        "--json", type=home_path, metavar="FILE",
        help="also write results here, and the output of failed workloads beside it; accuracy continues with the runs in it",
    )  # fmt: skip
    accuracy.add_arguments(parser)
    return parser


def _rounds(arguments: argparse.Namespace, options: Options) -> int:
    return int(arguments.rounds or (1 if options.gpus else 5))


def _command(arguments: argparse.Namespace, options: Options) -> str:
    """Return the command that repeats this measurement, without --data.root and time limits."""
    repeated: list[Any] = [
        arguments.benchmark, "--device", options.device, "--rounds", _rounds(arguments, options), "--steps", options.steps,
    ]  # fmt: skip
    if arguments.benchmark == "exact":
        repeated += ["--network", options.network]
    if arguments.benchmark == "train":
        repeated += [] if options.peers else ["--no-peers"]
        repeated += ["--batches", *options.batches, "--workloads", *options.workloads]
    return " ".join(map(str, ["python -m distributed.bench", *repeated]))


if __name__ == "__main__":
    run_command(main, starts_processes=True)
