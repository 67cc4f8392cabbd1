"""`python -m distributed.evaluate RUN [--split test] [--checkpoint best]`: evaluates a checkpoint.

Prints loss, top-1 and top-5, then the results per class, and draws the confusion matrix.
"""

import argparse
import json
import time
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed.config import TrainConfig, with_values
from distributed.data.sources import registry
from distributed.errors import ExitCode, InputError, NotFiniteError, PeerError, StorageError, reachable_paths
from distributed.files import home_path
from distributed.host.versions import require
from distributed.inference.saved_run import (
    check_complete,
    choose_checkpoint,
    for_device,
    read_config,
    read_content,
    warn_about_changes,
    with_data_root,
)
from distributed.process import gc_pause
from distributed.process.arguments import OneLineParser
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.output_file import check_writable, write_output
from distributed.process.streams import run_command
from distributed.topology import Topology, is_first_on_node

if TYPE_CHECKING:
    from distributed.data.pipeline import Split
    from distributed.engine.protocol import Engine
    from distributed.inference.confusion import Counts
    from distributed.training.totals import SplitTotals


def main() -> int:
    """Return the exit code. Under torchrun only rank 0 prints."""
    parser = OneLineParser(prog="python -m distributed.evaluate", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN", help="folder of the run")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument(
        "--checkpoint", default="auto", help="best, latest or e.g. step-00000313-epoch-001; auto: best if there is one"
    )
    parser.add_argument("--data.root", dest="root", type=home_path, help="folder of the data set, if it has moved")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="default: the run's device, or the CPU if the run used CUDA and this machine has no GPU",
    )
    parser.add_argument(
        "--confusion",
        type=home_path,
        metavar="FILE",
        help="file for the confusion matrix (default: RUN/confusion-SPLIT.png)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    arguments = parser.parse_args()
    try:
        with reachable_paths():
            return _checked_and_evaluated(arguments)
    except PeerError as error:
        return error.report()
    except (InputError, NotFiniteError, StorageError) as error:
        if is_first_on_node():
            error.report()
        _notify_waiting_peers(error)
        if not is_first_on_node():
            time.sleep(3)  # torchrun ends all ranks as soon as one exits: the first prints meanwhile
            error.report()  # still here, so only this rank failed
        return error.exit_code


def _checked_and_evaluated(arguments: argparse.Namespace) -> int:
    config = _config_of(arguments.run, arguments.root)
    checkpoint = choose_checkpoint(arguments.run, arguments.checkpoint)
    if arguments.split == "validation" and not config.data.validation_fraction:
        raise InputError("--split validation: this run held out no images; use --split test or train")
    if arguments.confusion:
        require("matplotlib", at_least=(3, 9), needed_by="--confusion")
        if Topology.from_environment().is_main:  # which alone writes it
            check_writable("--confusion", arguments.confusion, suffix=".png")
    return _evaluate(config, checkpoint, arguments)


def _notify_waiting_peers(error: InputError | NotFiniteError | StorageError) -> None:
    """Send the error to ranks that wait for this one."""
    with suppress(InputError):
        topology = Topology.from_environment()
        if topology.has_waiting_peers:
            from distributed.comm.peers import failure_message, notify_waiting_peers

            notify_waiting_peers(topology, error.exit_code, failure_message(error))


def _config_of(run: Path, root: Path | None) -> TrainConfig:
    config = with_data_root(read_config(run), root)
    config.check_importable()
    registry.prepare(config.data)
    return with_values(config, run_dir=run)  # the run may have been moved


def _evaluate(config: TrainConfig, checkpoint: Path, arguments: argparse.Namespace) -> int:
    with gc_pause.gc_paused():
        import torch

    from distributed.build import build_data, build_engine
    from distributed.comm.process_group import choose_device, process_group
    from distributed.data.checks import check_channels, check_evaluated
    from distributed.inference.confusion import MAX_CLASSES, ConfusionMatrix
    from distributed.network import build_network
    from distributed.process import logs
    from distributed.process.allocator import keep_freed_memory
    from distributed.training.determinism import make_deterministic
    from distributed.training.functions import build_functions
    from distributed.training.precision import for_evaluation
    from distributed.training.steps import evaluate
    from distributed.training.views import Views

    split: Split = arguments.split
    topology = Topology.from_environment()
    logs.terminal_logs(topology.rank, level="WARNING")
    check_complete(checkpoint)
    content = read_content(checkpoint)
    config = for_device(config, arguments.device, content)
    keep_freed_memory()
    torch.set_num_threads(topology.threads(config.threads))
    device = choose_device(config.device, topology)
    config = for_evaluation(config, device)
    make_deterministic(device, precision=config.precision)
    if topology.is_main:
        warn_about_changes(content, config.import_paths)
    # Before the process group, because decoding may take long, and importing a network may fail.
    data = build_data(config, topology, device)
    check_channels(content, config, data)
    if (many := data.num_classes > MAX_CLASSES) and arguments.confusion:
        raise InputError(f"--confusion: {data.num_classes:,} classes are too many for a matrix; leave it out")
    functions = build_functions(config, topology, data, device)
    network = build_network(config, topology, data, evaluates=split)
    with process_group(topology, device, timeout_seconds=config.timeout_seconds), reachable_paths():
        check_evaluated(content, config, data, split)
        data.normalize_by(**content["normalization"])
        check_same_checkpoint(checkpoint)
        engine = build_engine(config, topology, data, device, network)
        _load(checkpoint, engine)
        confusion = None if many else ConfusionMatrix(data.num_classes, device)
        views = Views.of(config.evaluation)
        totals = evaluate(
            engine, data, split, loss=functions.loss.evaluation, metrics=functions.metrics, views=views,
            device=device, observers=[confusion] if confusion else [],
        )  # fmt: skip
        counts = confusion.read() if confusion else None
    if topology.is_main:
        labels = Labels(config.model.name, config.data.name, split, checkpoint.name, content["classes"])
        picture = arguments.confusion or arguments.run / f"confusion-{split}.png"
        failure = _draw(labels, totals, counts, picture) if counts else None
        # Print the results before raising the failure: they may have taken long to compute.
        _print(labels, totals, counts, picture if counts and not failure else None, as_json=arguments.json)
        with requested_output("--confusion", picture) if arguments.confusion else OptionalOutput(picture):
            if failure:
                raise failure
    return ExitCode.FINISHED


def _load(checkpoint: Path, engine: "Engine") -> None:
    from distributed.checkpoint.tensor_file import read_tensors

    try:
        engine.load_state(read_tensors(checkpoint))
    except (ValueError, FileNotFoundError) as error:  # a run that is still training deletes old ones
        raise InputError(f"{checkpoint}: {error}; name another with --checkpoint") from None


def check_same_checkpoint(checkpoint: Path) -> None:
    """Check that all ranks evaluate one checkpoint: a run that trains meanwhile may move `best` and `latest`. A collective.

    Raises:
        InputError: they do not.
    """
    from distributed.comm.collectives import gather_objects

    if len(found := sorted({checkpoint.name for checkpoint in gather_objects(checkpoint)})) > 1:
        raise InputError(f"--checkpoint: the ranks found {' and '.join(found)}; name one of them")


class Labels(NamedTuple):
    """The names that describe an evaluation."""

    model: str
    data: str
    split: str
    checkpoint: str
    classes: list[str]


def _draw(labels: Labels, totals: "SplitTotals", counts: "Counts", picture: Path) -> Exception | None:
    """Draw the confusion matrix and return the error if that failed."""
    correct = f"{totals.accuracy:.2%} of {totals.count:,} correct"
    title = f"{labels.model} on {labels.data}, {labels.split} split: {correct}"
    try:
        from distributed.figures.confusion import confusion_figure
        from distributed.figures.style import as_png

        with confusion_figure(counts, labels.classes, title=title) as figure:
            write_output(picture, as_png(figure))
    except Exception as error:  # matplotlib raises errors of its own
        return error
    return None


def _print(
    labels: Labels, totals: "SplitTotals", counts: "Counts | None", picture: Path | None, *, as_json: bool
) -> None:
    from distributed.inference.confusion import as_lines, by_class

    results = by_class(counts, labels.classes) if counts else []
    if as_json:
        classes = [asdict(result) | {"confused_with": _pair(result.confused_with)} for result in results]
        content = {
            "model": labels.model, "data": labels.data, "split": labels.split, "checkpoint": labels.checkpoint,
            "images": totals.count, "loss": totals.mean_loss, "top1": totals.accuracy, "top5": totals.accuracy5,
            "metrics": {name: value if isfinite(value) else None for name, value in totals.metrics.items()},
            "classes": classes, "confusion": counts, "picture": picture and str(picture),
        }  # fmt: skip
        print(json.dumps(content))
        return
    print(
        f"{labels.model} on {labels.data}, {labels.split} split ({totals.count:,} images), {labels.checkpoint}: "
        f"loss {totals.mean_loss:.4f}, top-1 {totals.accuracy:.2%}, top-5 {totals.accuracy5:.2%}"
        + "".join(f", {name} {value:.4f}" for name, value in totals.metrics.items())
    )
    if results:
        print("", *as_lines(results), *(["", f"confusion matrix: {picture}"] if picture else []), sep="\n")


def _pair(pair: tuple[str, str, int] | None) -> dict[str, Any] | None:
    return {"class": pair[1], "images": pair[2]} if pair else None


if __name__ == "__main__":
    run_command(main, skip_cleanup=True)
