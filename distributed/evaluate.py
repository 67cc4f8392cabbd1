"""`python -m distributed.evaluate RUN [--split test] [--checkpoint best]`: how good a checkpoint is, at which classes.

Prints loss, top-1 and top-5, then each class; draws which classes are taken for which.
"""

import argparse
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.config import TrainConfig
from distributed.data.sources import registry
from distributed.errors import ExitCode, InputError, PeerError, StorageError
from distributed.files import check_writable, home_path, write_output
from distributed.host.versions import require
from distributed.inference.saved_run import (
    check_complete,
    choose_checkpoint,
    for_device,
    read_class_names,
    read_config,
    read_content,
    with_data_root,
)
from distributed.process import gc_pause
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.streams import run_command
from distributed.topology import Topology

if TYPE_CHECKING:
    from distributed.data.pipeline import Split
    from distributed.inference.confusion import Counts
    from distributed.training.totals import Totals


def main() -> int:
    """The exit code; prints on rank 0 where torchrun started several."""
    parser = argparse.ArgumentParser(prog="python -m distributed.evaluate", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN", help="folder of the run")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument(
        "--checkpoint", default="auto", help="best, latest, step-00000313-epoch-001; auto: best if there is one"
    )
    parser.add_argument("--data.root", dest="root", type=home_path, help="folder with the data set now")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="default: the run's device; the CPU if the run used CUDA and there is none here",
    )
    parser.add_argument(
        "--confusion",
        type=home_path,
        metavar="FILE",
        help="the drawn confusion matrix; RUN/confusion-SPLIT.png if not given",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    arguments = parser.parse_args()
    try:
        config = for_device(_config_of(arguments.run, arguments.root), arguments.device)
        checkpoint = choose_checkpoint(arguments.run, arguments.checkpoint)
        if arguments.split == "validation" and not config.data.validation_fraction:
            raise InputError("--split validation: this run held out no images; use --split test or train")
        if arguments.confusion:
            require("matplotlib", at_least=(3, 9), needed_by="--confusion")
            check_writable("--confusion", arguments.confusion)
        return _evaluate(config, checkpoint, arguments)
    except PeerError as error:
        return error.report()
    except (InputError, StorageError) as error:
        code = error.report()
        _notify_waiting_peers(error)
        return code


def _notify_waiting_peers(error: InputError | StorageError) -> None:
    """Let ranks that have met no error, and wait for this one, know of it."""
    with suppress(InputError):
        topology = Topology.from_environment()
        if topology.has_waiting_peers:
            from distributed.comm.peers import failure_message, notify_waiting_peers

            notify_waiting_peers(topology, error.exit_code, failure_message(error))


def _config_of(run: Path, root: Path | None) -> TrainConfig:
    config = with_data_root(read_config(run), root)
    registry.prepare(config.data)
    return config


def _evaluate(config: TrainConfig, checkpoint: Path, arguments: argparse.Namespace) -> int:
    with gc_pause.gc_paused():
        import torch

    from distributed.build import build_data, build_engine
    from distributed.checkpoint.snapshot import load as load_checkpoint
    from distributed.comm.process_group import choose_device, process_group
    from distributed.data.checks import check_evaluated
    from distributed.inference.confusion import ConfusionSums
    from distributed.process import logs
    from distributed.training.determinism import make_deterministic
    from distributed.training.steps import evaluate

    split: Split = arguments.split
    topology = Topology.from_environment()
    logs.terminal_logs(topology.rank, level="WARNING")
    torch.set_num_threads(topology.threads(config.threads))
    device = choose_device(config.device, topology)
    make_deterministic(device, precision=config.precision)
    check_complete(checkpoint)
    content = read_content(checkpoint)
    data = build_data(config, topology, device)  # before the group: a peer may be decoding for long
    with process_group(topology, device, timeout_seconds=config.timeout_seconds):
        check_evaluated(content, config, data, split)
        engine = build_engine(config, topology, data, device)
        try:
            load_checkpoint(checkpoint, engine)
        except ValueError as error:
            raise InputError(f"{checkpoint}: {error}; name another with --checkpoint") from None
        confusion = ConfusionSums(data.num_classes, device)
        flip_tta = config.evaluation.flip_tta
        totals = evaluate(engine, data, split, flip_tta=flip_tta, device=device, observers=[confusion])
        counts = confusion.read()
    if topology.is_main:
        facts = {"model": config.model.name, "data": config.data.name, "split": split, "checkpoint": checkpoint.name}
        names, picture = (
            read_class_names(content, config),
            arguments.confusion or arguments.run / f"confusion-{split}.png",
        )
        failure = _draw(facts, totals, counts, names, picture)
        # The numbers come first: they may have taken long.
        _tell(facts, totals, counts, names, None if failure else picture, as_json=arguments.json)
        with requested_output("--confusion", picture) if arguments.confusion else OptionalOutput(picture):
            if failure:
                raise failure
    return ExitCode.FINISHED


def _draw(
    facts: dict[str, str], totals: "Totals", counts: "Counts", names: list[str], picture: Path
) -> Exception | None:
    """The error, if it was not drawn."""
    title = (
        f"{facts['model']} on {facts['data']}, {facts['split']} split: {totals.accuracy:.2%} of {totals.count:,} right"
    )
    try:
        from distributed.figures.confusion import confusion_figure
        from distributed.figures.style import as_png

        with confusion_figure(counts, names, title=title) as figure:
            write_output(picture, as_png(figure))
    except Exception as error:  # matplotlib's own too
        return error
    return None


def _tell(
    facts: dict[str, str], totals: "Totals", counts: "Counts", names: list[str], picture: Path | None, *, as_json: bool
) -> None:
    from distributed.inference.confusion import as_lines, by_class

    results = by_class(counts, names)
    if as_json:
        figures: dict[str, Any] = {
            "images": totals.count, "loss": totals.mean_loss, "top1": totals.accuracy, "top5": totals.accuracy5,
        }  # fmt: skip
        classes = [asdict(result) | {"confused_with": _pair(result.confused_with)} for result in results]
        figures |= {"classes": classes, "confusion": counts, "picture": picture and str(picture)}
        print(json.dumps({**facts, **figures}))
        return
    print(
        f"{facts['model']} on {facts['data']}, {facts['split']} split ({totals.count:,} images), {facts['checkpoint']}: "
        f"loss {totals.mean_loss:.4f}, top-1 {totals.accuracy:.2%}, top-5 {totals.accuracy5:.2%}"
    )
    print("", *as_lines(results), *(["", f"confusion matrix: {picture}"] if picture else []), sep="\n")


def _pair(pair: tuple[str, str, int] | None) -> dict[str, Any] | None:
    return {"class": pair[1], "images": pair[2]} if pair else None


if __name__ == "__main__":
    run_command(main, skip_cleanup=True)
