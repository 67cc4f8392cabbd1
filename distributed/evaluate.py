"""`python -m distributed.evaluate RUN [--split test] [--checkpoint best]`: how good a checkpoint is, at which classes.

Prints loss, top-1 and top-5, then each class; draws which classes are taken for which.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.config import TrainConfig
from distributed.data import sources
from distributed.errors import ExitCode, InputError, PeerError
from distributed.files import check_writable
from distributed.saved_run import (
    check_whole,
    checkpoint_of,
    classes_of,
    config_of,
    content_of,
    on_device,
    with_data_root,
)
from distributed.topology import Topology

if TYPE_CHECKING:
    from distributed.confusion import Counts
    from distributed.data.pipeline import Split
    from distributed.sums import Totals


def main() -> int:
    """The exit code; prints on rank 0 where torchrun started several."""
    parser = argparse.ArgumentParser(prog="python -m distributed.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument(
        "--checkpoint", default="auto", help="best, latest, step-00000313-epoch-001; auto: best if there is one"
    )
    parser.add_argument("--data.root", dest="root", type=Path, help="folder with the data set now")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="default: the run's device; the CPU if the run used CUDA and there is none here",
    )
    parser.add_argument(
        "--confusion",
        type=Path,
        metavar="FILE",
        help="the drawn confusion matrix; RUN/confusion-SPLIT.png if not given",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    arguments = parser.parse_args()
    picture = arguments.confusion or arguments.run / f"confusion-{arguments.split}.png"
    try:
        config = on_device(_config_of(arguments.run, arguments.root), arguments.device)
        checkpoint = checkpoint_of(arguments.run, arguments.checkpoint)
        if arguments.split == "validation" and not config.data.validation_fraction:
            raise InputError("--split validation: this run held out no images; use --split test or train")
        check_writable("--confusion", picture)
        return _evaluate(config, checkpoint, arguments.split, picture, as_json=arguments.json)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _config_of(run: Path, root: Path | None) -> TrainConfig:
    config = with_data_root(config_of(run), root)
    sources.prepare(config.data)
    return config


def _evaluate(config: TrainConfig, checkpoint: Path, split: "Split", picture: Path, *, as_json: bool) -> int:
    import torch

    from distributed import logs
    from distributed.build import build_data, build_engine
    from distributed.confusion import ConfusionSums
    from distributed.determinism import make_deterministic
    from distributed.loop import evaluate
    from distributed.process_group import choose_device, process_group
    from distributed.snapshot import load as load_checkpoint

    topology = Topology.from_environment()
    logs.terminal_logs(topology.rank, level="WARNING")
    torch.set_num_threads(topology.threads(config.threads))
    device = choose_device(config.device, topology)
    make_deterministic(device, precision=config.precision)
    check_whole(checkpoint)
    content = content_of(checkpoint)
    data = build_data(config, topology, device)  # before the group: a peer may be decoding for long
    with process_group(topology, device, timeout_seconds=config.timeout_seconds):
        engine = build_engine(config, topology, data, device)
        try:
            load_checkpoint(checkpoint, engine)
        except ValueError as error:
            raise InputError(f"{checkpoint}: {error}; name another with --checkpoint") from None
        confusion = ConfusionSums(data.num_classes, device)
        flips = config.evaluation.flips
        totals = evaluate(engine, data, split, flips=flips, device=device, observers=[confusion])
        counts = confusion.read()
    if topology.is_main:
        facts = {"model": config.model.name, "data": config.data.name, "split": split, "checkpoint": checkpoint.name}
        _tell(facts, totals, counts, classes_of(content, config), picture, as_json=as_json)
    return ExitCode.FINISHED


def _tell(
    facts: dict[str, str], totals: "Totals", counts: "Counts", names: list[str], picture: Path, *, as_json: bool
) -> None:
    from distributed.confusion import as_lines, by_class
    from distributed.figures.confusion import confusion_figure
    from distributed.figures.style import as_png

    results = by_class(counts, names)
    title = (
        f"{facts['model']} on {facts['data']}, {facts['split']} split: {totals.accuracy:.2%} of {totals.count:,} right"
    )
    with confusion_figure(counts, names, title=title) as figure:
        picture.write_bytes(as_png(figure))
    if as_json:
        figures: dict[str, Any] = {
            "images": totals.count, "loss": totals.mean_loss, "top1": totals.accuracy, "top5": totals.accuracy5,
        }  # fmt: skip
        classes = [asdict(result) | {"confused_with": _pair(result.confused_with)} for result in results]
        print(json.dumps({**facts, **figures, "classes": classes, "confusion": counts, "picture": str(picture)}))
        return
    print(
        f"{facts['model']} on {facts['data']}, {facts['split']} split ({totals.count:,} images), {facts['checkpoint']}: "
        f"loss {totals.mean_loss:.4f}, top-1 {totals.accuracy:.2%}, top-5 {totals.accuracy5:.2%}"
    )
    print("", *as_lines(results), "", f"confusion matrix: {picture}", sep="\n")


def _pair(pair: tuple[str, str, int] | None) -> dict[str, Any] | None:
    return {"class": pair[1], "images": pair[2]} if pair else None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
