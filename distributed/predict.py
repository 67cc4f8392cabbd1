"""`python -m distributed.predict RUN IMAGE...`: what a run's network takes images for.

An image may have any size: its shorter side is scaled, with antialiasing, to that the network was trained on, and the centre
is taken.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.config.data import MAX_PIXELS, max_pixels_of
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import check_writable, home_path, write_output
from distributed.host.versions import require
from distributed.inference.saved_run import checkpoint_of, config_of, unfetched, with_data_root
from distributed.process import gc_pause
from distributed.process.optional_output import requested_output
from distributed.process.streams import run_command

if TYPE_CHECKING:
    from torch import Tensor

    from distributed.config import TrainConfig

_TOP = 5


def main() -> int:
    """The exit code; prints a line an image."""
    parser = argparse.ArgumentParser(prog="python -m distributed.predict", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN", help="folder of the run")
    parser.add_argument("images", type=home_path, nargs="+", metavar="IMAGE", help="files of any common format")
    parser.add_argument("--checkpoint", default="auto", help="best, latest or a name; auto: best if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--picture", type=home_path, metavar="OUT.png", help="draw the images with their predicted classes"
    )
    parser.add_argument(
        "--data.max_pixels", dest="max_pixels", type=int, metavar="N", help="largest image that is decoded; the run's"
    )
    parser.add_argument(
        "--data.root",
        dest="root",
        type=home_path,
        help="the data set; only for checkpoints without the images' normalization",
    )
    arguments = parser.parse_args()
    try:
        config = unfetched(with_data_root(config_of(arguments.run), arguments.root))
        checkpoint = checkpoint_of(arguments.run, arguments.checkpoint)
        if missing := [path for path in arguments.images if not os.path.isfile(path)]:
            raise InputError(*[f"{path}: no such file; name images that are there" for path in missing])
        if arguments.picture:
            require("matplotlib", at_least=(3, 9), needed_by="--picture")
            check_writable("--picture", arguments.picture)
        max_pixels = max_pixels_of(config.data) if arguments.max_pixels is None else arguments.max_pixels
        if max_pixels < 1:
            raise InputError(f"--data.max_pixels {max_pixels}: should be at least 1")
        found, inputs = _predict(config, checkpoint, arguments.images, max_pixels)
        if arguments.json:
            print(json.dumps({"run": str(arguments.run), "checkpoint": checkpoint.name, "images": found}))
        else:
            print(*_table(found), sep="\n")
        if arguments.picture:
            with requested_output("--picture", arguments.picture):
                _draw(inputs, found, arguments.picture)
    except (InputError, StorageError) as error:
        return error.tell()
    return ExitCode.FINISHED


def _predict(
    config: "TrainConfig", checkpoint: Path, paths: list[Path], max_pixels: int
) -> tuple[list[dict[str, Any]], list["Tensor"]]:
    """For each image its path and its likeliest classes, with probabilities; and the network's inputs."""
    with gc_pause.gc_paused():
        import torch

    from distributed.build import read_data
    from distributed.data.sources.image_file import read_image
    from distributed.data.sources.image_size import TooLarge
    from distributed.inference.classifier import load_trained

    trained = load_trained(config, checkpoint, data=lambda: read_data(config))
    # One after the other: an image may be large, and its input is small.
    inputs = []
    for path in paths:
        image = read_image(path, max_pixels=max_pixels)
        try:
            inputs.append(_input(image, trained.side, max_pixels))
        except TooLarge as error:
            raise InputError(f"{path}: {error}") from None
    with torch.no_grad():
        logits = torch.cat([trained.classifier(one) for one in inputs])
    probabilities, classes = logits.softmax(1).topk(min(_TOP, len(trained.classes)), dim=1)
    found = [
        {
            "image": str(path),
            "top": [{"class": trained.classes[c], "probability": p} for c, p in zip(*row, strict=True)],
        }
        for path, *row in zip(paths, classes.tolist(), probabilities.tolist(), strict=True)
    ]
    return found, inputs


def _input(image: "Tensor", side: int, max_pixels: int = MAX_PIXELS) -> "Tensor":
    """An image [3, h, w] in [0, 1] as those in folders are made ready for training: a batch [1, 3, side, side]."""
    from distributed.data.sources.decode import to_square

    square = to_square((image * 255).round().byte(), side, max_pixels)
    return square.permute(2, 0, 1)[None] / 255


def _draw(inputs: list["Tensor"], found: list[dict[str, Any]], picture: Path) -> None:
    from distributed.figures.predictions import predictions_figure
    from distributed.figures.style import as_png

    images = [one[0].permute(1, 2, 0).numpy() for one in inputs]
    tops = [[(top["class"], top["probability"]) for top in one["top"]] for one in found]
    with predictions_figure(images, tops, [Path(one["image"]).name for one in found]) as figure:
        write_output(picture, as_png(figure))


def _table(found: list[dict[str, Any]]) -> list[str]:
    """A line an image: its path, then the classes from the likeliest on."""
    width = max(len(one["image"]) for one in found)
    names = max(len(top["class"]) for one in found for top in one["top"])
    return [
        f"{one['image']:{width}}  "
        + "  ".join(f"{top['class']:{names}} {top['probability']:7.2%}" for top in one["top"])
        for one in found
    ]


if __name__ == "__main__":
    run_command(main)
