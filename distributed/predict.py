"""`python -m distributed.predict RUN IMAGE...`: what a run's network takes images for.

An image may have any size: its shorter side is scaled, with antialiasing, to that the network was trained on, and the centre
is taken.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import collector
from distributed.errors import ExitCode, InputError
from distributed.files import check_writable
from distributed.saved_run import checkpoint_of, config_of, unfetched, with_data_root

if TYPE_CHECKING:
    from torch import Tensor

    from distributed.classifier import Trained
    from distributed.config import TrainConfig

_TOP = 5


def main() -> int:
    """The exit code; prints a line an image."""
    parser = argparse.ArgumentParser(prog="python -m distributed.predict", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files of any common format")
    parser.add_argument("--checkpoint", default="auto", help="best, latest or a name; auto: best if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="draw the images with what they are taken for")
    parser.add_argument(
        "--data.root",
        dest="root",
        type=Path,
        help="the data set; only for checkpoints without the images' normalization",
    )
    arguments = parser.parse_args()
    try:
        config = unfetched(with_data_root(config_of(arguments.run), arguments.root))
        checkpoint = checkpoint_of(arguments.run, arguments.checkpoint)
        if missing := [path for path in arguments.images if not path.is_file()]:
            raise InputError(*[f"{path}: no such file; name images that are there" for path in missing])
        if arguments.picture:
            check_writable("--picture", arguments.picture)
        found = _predict(config, checkpoint, arguments.images, arguments.picture)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "checkpoint": checkpoint.name, "images": found}))
    else:
        print(*_table(found), sep="\n")
    return ExitCode.FINISHED


def _predict(config: "TrainConfig", checkpoint: Path, paths: list[Path], picture: Path | None) -> list[dict[str, Any]]:
    """Of each image its path and the classes it is most likely of, with probabilities; drawn where a picture is asked for."""
    with collector.at_rest():
        import torch

    from distributed.build import read_data
    from distributed.classifier import load_trained
    from distributed.data.image_file import read_image

    trained = load_trained(config, checkpoint, data=lambda: read_data(config))
    images = [read_image(path) for path in paths]
    with torch.no_grad():
        logits = torch.cat([trained.classifier(_input(image, trained.side)) for image in images])
    probabilities, classes = logits.softmax(1).topk(min(_TOP, len(trained.classes)), dim=1)
    found = [
        {
            "image": str(path),
            "top": [{"class": trained.classes[c], "probability": p} for c, p in zip(*row, strict=True)],
        }
        for path, *row in zip(paths, classes.tolist(), probabilities.tolist(), strict=True)
    ]
    if picture:
        _draw(trained, images, found, picture)
    return found


def _input(image: "Tensor", side: int) -> "Tensor":
    """An image [3, h, w] in [0, 1] as those in folders are made ready for training: a batch [1, 3, side, side]."""
    from distributed.data.decode import to_square

    square = to_square((image * 255).round().byte(), side)
    return square.permute(2, 0, 1)[None] / 255


def _draw(trained: "Trained", images: list["Tensor"], found: list[dict[str, Any]], picture: Path) -> None:
    from distributed.figures.predictions import predictions_figure
    from distributed.figures.style import as_png

    inputs = [_input(image, trained.side)[0].permute(1, 2, 0).numpy() for image in images]
    tops = [[(top["class"], top["probability"]) for top in one["top"]] for one in found]
    with predictions_figure(inputs, tops, [Path(one["image"]).name for one in found]) as figure:
        picture.write_bytes(as_png(figure))


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
    sys.exit(main())
