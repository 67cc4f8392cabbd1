"""`python -m distributed.export RUN [--format onnx ...] [--out FOLDER]`: export a run's network to portable formats.

Every exported file takes float32 images [n, channels, h, w] with pixels in [0, 1], for any n, and returns logits [n, classes];
it includes the normalization. Each file is loaded again, and its logits must match the network's within the tolerance.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.config.data import ImageFolderData
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import home_path
from distributed.inference.saved_run import (
    choose_checkpoint,
    read_config,
    read_content,
    with_data_root,
    without_download,
)
from distributed.process import gc_pause
from distributed.process.arguments import OneLineParser
from distributed.process.optional_output import one_line, requested_output
from distributed.process.output_file import check_writable, write_output
from distributed.process.streams import run_command

if TYPE_CHECKING:
    from distributed.config import TrainConfig
    from distributed.data.pipeline import DataPipeline
    from distributed.inference.trained_run import TrainedRun

_FILES = {"safetensors": ("model.safetensors", "model.json"), "onnx": ("model.onnx",), "torch.export": ("model.pt2",)}
_NAMES = tuple(_FILES)


@prints_errors
def main() -> int:
    """Return the exit code: 1 if a file's logits differ from the network's by more than the tolerance."""
    arguments = _parser().parse_args()
    out = arguments.out or arguments.run / "export"
    config = without_download(with_data_root(read_config(arguments.run), arguments.root))
    config.model.check_importable()
    checkpoint = choose_checkpoint(arguments.run, arguments.checkpoint)
    names = _formats(arguments.format)
    for file in (file for name in names for file in _FILES[name]):
        check_writable("--out", out / file, regular=True)  # each is read back
    needs_data = arguments.root is not None
    return _export(config, checkpoint, names, out, tolerance=arguments.tolerance, needs_data=needs_data)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m distributed.export", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--format", nargs="+", default=["all"], metavar="FORMAT", help=f"{', '.join(_NAMES)} or all; default: all"
    )
    parser.add_argument("--out", type=home_path, metavar="FOLDER", help="output folder; default: RUN/export")
    parser.add_argument("--checkpoint", default="auto", help="best, latest or a name; auto: best if there is one")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference allowed between logits; default: 1e-4"
    )
    parser.add_argument(
        "--data.root", dest="root", type=home_path, help="folder with the data set, to compare logits on its images"
    )
    return parser


def _formats(requested: list[str]) -> list[str]:
    unknown = [name for name in requested if name not in (*_NAMES, "all")]
    if unknown:
        raise InputError(*[f"--format {name}: should be one of {', '.join(_NAMES)}, all" for name in unknown])
    return [name for name in _NAMES if name in requested or "all" in requested]


def _export(
    config: "TrainConfig", checkpoint: Path, names: list[str], out: Path, *, tolerance: float, needs_data: bool
) -> int:
    with gc_pause.gc_paused():
        from distributed.inference.trained_run import load_checkpoint
    from distributed.export.formats import FORMATS
    from distributed.export.parity import largest_difference, reference
    from distributed.process import logs

    logs.terminal_logs(0, level="WARNING")
    trained = load_checkpoint(config, checkpoint)
    expected = reference(trained, _data_or_none(trained, needed=needs_data))
    metadata = _metadata(trained)
    print(f"{config.model.name} of {checkpoint}; compared on {len(expected.images)} {expected.source}")
    if config.evaluation.flip_tta or config.evaluation.shift_tta:
        print("the run's evaluations average several views of an image; the exported network computes one")
    all_match, failed = True, list[str]()
    for name in names:
        exported = out / FORMATS[name].file
        try:
            contents = FORMATS[name].contents(trained, metadata)
        except Exception as error:  # torch.export cannot trace every network that someone brings
            reason = f"model.name = {config.model.name} cannot be exported: {one_line(error)}"
            failed.append(f"--format {name}: {reason}; the other formats are written")
            continue
        for file, content in contents.items():
            with requested_output("--out", out / file):
                write_output(out / file, content)
        try:
            difference = largest_difference(FORMATS[name].load(exported), expected)
        except Exception as error:  # e.g. onnxruntime is not installed, or lacks an operation
            failed.append(f"--format {name}: {exported} is written, but could not be checked: {one_line(error)}")
            continue
        matches = difference <= tolerance
        all_match &= matches
        verdict = "" if matches else f", MORE THAN {tolerance:g}: do not use this file"
        size = exported.stat().st_size
        print(f"{name:12}  {exported}  {size:,} bytes, largest difference of a logit {difference:.2e}{verdict}")
    if failed:
        raise InputError(*failed)
    return ExitCode.FINISHED if all_match else ExitCode.FAILED


def _data_or_none(trained: "TrainedRun", *, needed: bool) -> "DataPipeline | None":
    """Return the run's images; if they are not `needed`, None where they are missing, or would have to be decoded."""
    from distributed.build import read_data
    from distributed.data.checks import check_channels

    if isinstance(trained.config.data, ImageFolderData) and not needed:
        return None
    try:
        data = read_data(trained.config)
        check_channels(read_content(trained.checkpoint), trained.config, data)
        size = tuple(data.raw_images(1).shape[1:3])
        if size != trained.stored_size:
            (height, width), (before_h, before_w) = size, trained.stored_size
            raise InputError(
                f"the images have {height} x {width} pixels here, but had {before_h} x {before_w} in training: point "
                "--data.root at images of that size, or leave it out"
            )
        return data
    except InputError:
        if needed:
            raise
        return None


def _metadata(trained: "TrainedRun") -> dict[str, Any]:
    """Return the metadata stored with the exported files."""
    colours = "RGB" if trained.input_shape[0] == 3 else "grey"
    return {
        "architecture": trained.config.model.model_dump(mode="json"),
        "classes": trained.class_names,
        "normalization": trained.normalization._asdict(),
        "input": {
            "images": ["n", *trained.input_shape],
            "type": f"float32, {colours}, pixels in [0, 1]",
            "scaled_from": list(trained.stored_size),
        },
        "output": {"logits": ["n", len(trained.class_names)]},
        "evaluation": {name: getattr(trained.config.evaluation, name) for name in ("flip_tta", "shift_tta")},
        "data": trained.config.data.name,
        "checkpoint": trained.checkpoint.name,
    }


if __name__ == "__main__":
    run_command(main, skip_cleanup=True)
