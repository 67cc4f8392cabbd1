"""`python -m distributed.predict RUN IMAGE...`: classify images with a run's trained network.

An image may have any size: its shorter side is scaled, with antialiasing, to the size of the training images, and the centre is
cropped. Probabilities are averaged as in the run's evaluations, e.g. over an image and its mirror image.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.config.data import max_pixels_of
from distributed.errors import ExitCode, InputError, on_one_line, prints_errors
from distributed.files import home_path
from distributed.host.versions import require
from distributed.inference.saved_run import choose_checkpoint, read_config
from distributed.process import gc_pause
from distributed.process.arguments import OneLineParser
from distributed.process.optional_output import requested_output
from distributed.process.output_file import check_writable, write_output
from distributed.process.streams import run_command
from distributed.runs.table import in_columns

if TYPE_CHECKING:
    from torch import Tensor

    from distributed.config import TrainConfig

_TOP = 5
_PICTURED = 60


@dataclass(frozen=True)
class Prediction:
    """An image's most probable classes, most probable first, as (class, probability)."""

    image: str
    top: list[tuple[str, float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"top": [{"class": name, "probability": p} for name, p in self.top]}


@prints_errors
def main() -> int:
    """Print a line per image that can be read; return the exit code."""
    arguments = _parser().parse_args()
    config = read_config(arguments.run)
    config.model.check_importable()
    checkpoint = choose_checkpoint(arguments.run, arguments.checkpoint)
    if wrong := [_why_no_image(path) for path in arguments.images if not os.path.isfile(path)]:
        raise InputError(*wrong)
    if arguments.picture:
        require("matplotlib", at_least=(3, 9), needed_by="--picture")
        check_writable("--picture", arguments.picture, suffix=".png")
    max_pixels = max_pixels_of(config.data) if arguments.max_pixels is None else arguments.max_pixels
    if max_pixels < 1:
        raise InputError(f"--data.max_pixels {max_pixels}: should be at least 1")
    predictions, pixels, wrong = _predict(
        config, checkpoint, arguments.images, max_pixels, keep_pixels=bool(arguments.picture)
    )
    if arguments.json:
        images = [prediction.as_json() for prediction in predictions]
        print(json.dumps({"run": str(arguments.run), "checkpoint": checkpoint.name, "images": images}))
    else:
        print(*_table(predictions), sep="\n")
    if arguments.picture:
        with requested_output("--picture", arguments.picture):
            _draw(pixels, predictions[: len(pixels)], arguments.picture)
        if len(pixels) < len(predictions):
            print(f"{arguments.picture}: the first {len(pixels)} of {len(predictions)} images", file=sys.stderr)
    if wrong:
        raise InputError(*wrong)
    return ExitCode.FINISHED


def _why_no_image(path: Path) -> str:
    if os.path.isdir(path):
        return f"{path}: a folder; name the images in it, e.g. {path}/*.jpg"
    return f"{path}: no such file; name existing images"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m distributed.predict", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN", help="run folder")
    parser.add_argument("images", type=home_path, nargs="+", metavar="IMAGE", help="image files in any common format")
    parser.add_argument("--checkpoint", default="auto", help="best, latest or a name; auto: best if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--picture", type=home_path, metavar="OUT.png", help="draw the images with their predicted classes"
    )
    parser.add_argument(
        "--data.max_pixels",
        dest="max_pixels",
        type=int,
        metavar="N",
        help="maximum number of pixels of an image; default: the run's",
    )
    return parser


def _predict(
    config: "TrainConfig", checkpoint: Path, paths: list[Path], max_pixels: int, *, keep_pixels: bool
) -> tuple[list[Prediction], list["Tensor"], list[str]]:
    """Return each image's prediction, the pixels [1, channels, h, w] of the first ones if they are to be kept, and a line for
    each image that cannot be used."""
    with gc_pause.gc_paused():
        import torch
        from torch import Tensor

    from distributed.data.sources.image_file import read_image
    from distributed.data.sources.image_size import TooLarge
    from distributed.inference.trained_run import load_checkpoint
    from distributed.process import logs

    logs.terminal_logs(0, level="WARNING")
    trained = load_checkpoint(config, checkpoint)
    read, pixels, logits, wrong = list[Path](), list[Tensor](), list[Tensor](), list[str]()
    for path in paths:
        try:
            resized = trained.resize(read_image(path, max_pixels=max_pixels), max_pixels=max_pixels)
        except TooLarge as error:
            wrong.append(f"{path}: {error}")
            continue
        except InputError as error:
            wrong += error.lines
            continue
        read.append(path)
        logits.append(trained.logits(resized))
        if keep_pixels and len(pixels) < _PICTURED:
            pixels.append(resized)
    if not read:
        raise InputError(*wrong)
    top = torch.cat(logits).softmax(1).topk(min(_TOP, len(trained.class_names)), dim=1)
    predictions = [
        Prediction(str(path), [(trained.class_names[c], p) for c, p in zip(classes, probabilities, strict=True)])
        for path, classes, probabilities in zip(read, top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return predictions, pixels, wrong


def _draw(pixels: list["Tensor"], predictions: list[Prediction], picture: Path) -> None:
    from distributed.figures.predictions import predictions_figure
    from distributed.figures.style import as_png

    images = [each[0].expand(3, -1, -1).permute(1, 2, 0).numpy() for each in pixels]
    titles = [Path(prediction.image).name for prediction in predictions]
    with predictions_figure(images, [prediction.top for prediction in predictions], titles) as figure:
        write_output(picture, as_png(figure))


def _table(predictions: list[Prediction]) -> list[str]:
    """Format a line per image: its path, then its classes, most probable first."""
    tops = [[(on_one_line(name), p) for name, p in prediction.top] for prediction in predictions]
    names = max(len(name) for top in tops for name, _ in top)
    rows = [[on_one_line(prediction.image)] for prediction in predictions]
    for row, top in zip(rows, tops, strict=True):
        row += [f"{name:{names}} {p:7.2%}" for name, p in top]
    return in_columns(rows)


if __name__ == "__main__":
    run_command(main)
