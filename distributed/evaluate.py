"""`python -m distributed.evaluate RUN [--split test] [--checkpoint best]`: loss, top-1 and top-5 of a run's checkpoint."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.config import TrainConfig, load, with_values
from distributed.data import sources
from distributed.errors import ExitCode, InputError
from distributed.run_folder import RunFolder
from distributed.topology import Topology

if TYPE_CHECKING:
    from distributed.data.pipeline import Split


def main() -> int:
    """The exit code; prints one line of figures, on rank 0 where torchrun started several."""
    parser = argparse.ArgumentParser(prog="python -m distributed.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument(
        "--checkpoint", default="auto", help="best, latest, step-00000313-epoch-001; auto: best if there is one"
    )
    parser.add_argument("--data.root", dest="root", type=Path, help="where the data set lies now")
    arguments = parser.parse_args()
    try:
        config = _config_of(arguments.run, arguments.root)
        checkpoint = _checkpoint_of(RunFolder(arguments.run), arguments.checkpoint)
        if arguments.split == "validation" and not config.data.validation_fraction:
            raise InputError("--split validation: this run held out no images; use --split test or train")
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    return _evaluate(config, checkpoint, arguments.split)


def _config_of(run: Path, root: Path | None) -> TrainConfig:
    folder = RunFolder(run)
    if not folder.config_file.is_file():
        raise InputError(f"{run}: no config.toml there; RUN is the folder that a training run wrote (its --run_dir)")
    config, _ = load([str(folder.config_file)])
    if root is not None:
        if "root" not in type(config.data).model_fields:
            raise InputError(f"--data.root {root}: this run was on data.name = {config.data.name}; leave it out")
        config = with_values(config, data=config.data.model_copy(update={"root": root}))
    sources.prepare(config.data)
    return config


def _checkpoint_of(folder: RunFolder, name: str) -> Path:
    names = ("best", "latest") if name == "auto" else (name,)
    for candidate in names:
        if (folder.checkpoints / candidate / "manifest.json").is_file():
            return (folder.checkpoints / candidate).resolve()
    there = sorted(path.name for path in folder.checkpoints.glob("[!.]*") if (path / "manifest.json").is_file())
    raise InputError(f"--checkpoint {name}: not in {folder.checkpoints}; there are: {', '.join(there) or 'none'}")


def _evaluate(config: TrainConfig, checkpoint: Path, split: "Split") -> int:
    import torch

    from distributed import logs
    from distributed.build import build_data, build_engine
    from distributed.checkpoint import damage_of
    from distributed.checkpoint import load as load_checkpoint
    from distributed.loop import evaluate
    from distributed.process_group import choose_device, make_deterministic, process_group

    topology = Topology.from_environment()
    logs.terminal_logs(topology.rank, level="WARNING")
    torch.set_num_threads(topology.threads(config.threads))
    device = choose_device(config.device, topology)
    make_deterministic(device)
    if damage := damage_of(checkpoint):
        print(f"error: {checkpoint}: damaged: {damage}; name another with --checkpoint", file=sys.stderr)
        return ExitCode.BAD_INPUT
    data = build_data(config, topology, device)  # before the group: a peer may be decoding for long
    with process_group(topology, device, timeout_seconds=config.timeout_seconds):
        engine = build_engine(config, topology, data, device)
        load_checkpoint(checkpoint, engine)
        totals = evaluate(engine, data, split, device=device)
    if topology.is_main:
        print(
            f"{config.model.name} on {config.data.name}, {split} split ({totals.count:,} images), {checkpoint.name}: "
            f"loss {totals.mean_loss:.4f}, top-1 {totals.accuracy:.2%}, top-5 {totals.accuracy5:.2%}"
        )
    return ExitCode.FINISHED


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
