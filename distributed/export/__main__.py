"""`python -m distributed.export RUN [--format onnx ...] [--out FOLDER]`: a run's network in formats that others can run.

Each takes float32 images [n, 3, side, side] of pixels in [0, 1], for any n, and gives logits [n, classes]; normalization is
inside. Each file is loaded again and must give the network's logits, within the tolerance.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import check_writable, home_path, write_output
from distributed.inference.saved_run import checkpoint_of, config_of, unfetched, with_data_root
from distributed.process import gc_pause
from distributed.process.optional_output import requested_output
from distributed.process.streams import run_command

if TYPE_CHECKING:
    from distributed.config import TrainConfig
    from distributed.data.pipeline import DataPipeline
    from distributed.inference.classifier import Trained

_NAMES = ("safetensors", "onnx", "torch.export")


def main() -> int:
    """The exit code: 1 where a file does not give the network's logits."""
    parser = argparse.ArgumentParser(prog="python -m distributed.export", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--format",
        nargs="+",
        default=["all"],
        metavar="FORMAT",
        help=f"{', '.join(_NAMES)} or all, which is the default",
    )
    parser.add_argument("--out", type=home_path, metavar="FOLDER", help="where the files go; RUN/export if not given")
    parser.add_argument("--checkpoint", default="auto", help="best, latest or a name; auto: best if there is one")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (1e-4)")
    parser.add_argument(
        "--data.root", dest="root", type=home_path, help="where the data set is now, to compare on its images"
    )
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "export"
    try:
        config = unfetched(with_data_root(config_of(arguments.run), arguments.root))
        checkpoint = checkpoint_of(arguments.run, arguments.checkpoint)
        names = _formats(arguments.format)
        for name in ("model.safetensors", "model.json", "model.onnx", "model.pt2"):
            check_writable("--out", out / name, regular=True)  # each is read again
        return _export(config, checkpoint, names, out, tolerance=arguments.tolerance)
    except (InputError, StorageError) as error:
        return error.tell()


def _formats(asked: list[str]) -> list[str]:
    unknown = [name for name in asked if name not in (*_NAMES, "all")]
    if unknown:
        raise InputError(*[f"--format {name}: should be one of {', '.join(_NAMES)}, all" for name in unknown])
    return [name for name in _NAMES if name in asked or "all" in asked]


def _export(config: "TrainConfig", checkpoint: Path, names: list[str], out: Path, *, tolerance: float) -> int:
    with gc_pause.gc_paused():
        from distributed.inference.classifier import load_trained
    from distributed.build import read_data
    from distributed.export.formats import FORMATS
    from distributed.export.parity import difference, reference

    trained = load_trained(config, checkpoint, data=lambda: read_data(config))
    expected = reference(trained, _data_or_none(config))
    facts = _facts(config, checkpoint, trained)
    print(f"{config.model.name} of {checkpoint}; compared on {len(expected.images)} {expected.source}")
    good = True
    for name in names:
        file = out / FORMATS[name].file
        for part, content in FORMATS[name].contents(trained, facts).items():
            with requested_output("--out", out / part):
                write_output(out / part, content)
        off = difference(FORMATS[name].load(file), expected)
        within = off <= tolerance
        good &= within
        verdict = "" if within else f", MORE THAN {tolerance:g}: do not use this file"
        print(f"{name:12}  {file}  {file.stat().st_size:,} bytes, largest difference of a logit {off:.2e}{verdict}")
    return ExitCode.FINISHED if good else ExitCode.FAILED


def _data_or_none(config: "TrainConfig") -> "DataPipeline | None":
    """The run's images, or none where they do not lie where the config says."""
    from distributed.build import read_data

    try:
        return read_data(config)
    except InputError:
        return None


def _facts(config: "TrainConfig", checkpoint: Path, trained: "Trained") -> dict[str, Any]:
    """What a user of the files must know."""
    return {
        "architecture": config.model.model_dump(mode="json"),
        "classes": trained.classes,
        "normalization": trained.normalization._asdict(),
        "input": {"images": ["n", 3, trained.side, trained.side], "type": "float32, RGB, pixels in [0, 1]"},
        "output": {"logits": ["n", len(trained.classes)]},
        "data": config.data.name,
        "checkpoint": checkpoint.name,
    }


if __name__ == "__main__":
    run_command(main, skip_cleanup=True)
