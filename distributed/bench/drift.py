"""`python -m distributed.bench.drift --data.root FOLDER PICTURE.png`: draws how far loss curves drift apart.

Trains one epoch on 1 and on 3 processes, in fast and in exact mode, and draws the curves over each other.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from distributed.data.sources import cifar
from distributed.errors import prints_errors
from distributed.files import check_writable, home_path
from distributed.process.streams import run_command
from distributed.process.torchrun import torchrun_command
from distributed.run.folder import RunFolder

RANKS = (1, 3)
MODES = {"fast mode": "0", "exact mode, 8 shards": "8"}


def losses_of_run(root: Path, run_dir: Path, *, ranks: int, shards: str) -> list[float]:
    """Train improved_alexnet on CIFAR-10 for one epoch, and return the logged loss of each step."""
    arguments = [
        "--data.name", "cifar10", "--data.root", str(root), "--run_dir", str(run_dir),
        "--epochs", "1", "--exact.shards", shards, "--logging.every_steps", "1", "--logging.tensorboard", "false",
    ]  # fmt: skip
    subprocess.run(torchrun_command(ranks, "distributed.train", arguments), check=True, capture_output=True)
    lines = [json.loads(line) for line in RunFolder(run_dir).metrics_file.read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def draw(curves: dict[str, list[list[float]]], target: Path) -> None:
    """Draw, for each mode, the losses of both runs above and their absolute difference below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 6.5), sharex=True, sharey="row", layout="constrained")
    for column, (mode, (first, second)) in enumerate(curves.items()):
        above, below = axes[0][column], axes[1][column]
        steps = range(1, len(first) + 1)
        above.plot(steps, first, color="tab:blue", linewidth=3.5, alpha=0.5, label=f"{RANKS[0]} process")
        above.plot(steps, second, color="tab:red", linewidth=1, label=f"{RANKS[1]} processes")
        differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
        below.plot(steps, differences, color="black", linewidth=1)
        below.set_yscale("symlog", linthresh=1e-7)
        below.set_ylim(bottom=-3e-8)
        below.set_title(
            f"{differences.count(0.0)} of {len(first)} losses bit-identical; largest difference {max(differences):.2g}",
            size=10,
        )
        above.set_title(mode)
        below.set_xlabel("step")
        for panel in (above, below):
            panel.grid(alpha=0.3)
        above.legend()
    axes[0][0].set_ylabel("training loss")
    axes[1][0].set_ylabel("difference of the losses")
    figure.savefig(target, dpi=110)


@prints_errors
def main() -> int:
    """Train four times, draw the curves and print the largest differences."""
    parser = argparse.ArgumentParser(prog="python -m distributed.bench.drift", description=__doc__)
    parser.add_argument("picture", type=home_path)
    parser.add_argument("--data.root", dest="root", type=home_path, default=Path("data"), help="folder with CIFAR-10")
    arguments = parser.parse_args()
    cifar.check("cifar10", arguments.root)
    check_writable("PICTURE.png", arguments.picture)
    curves: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode, shards in MODES.items():
            runs = [(ranks, Path(folder) / f"{shards}-{ranks}") for ranks in RANKS]
            curves[mode] = [losses_of_run(arguments.root, run, ranks=ranks, shards=shards) for ranks, run in runs]
            largest = max(abs(a - b) for a, b in zip(*curves[mode], strict=True))
            print(
                f"{mode}: largest difference of {len(curves[mode][0])} losses between {RANKS[0]} process and "
                f"{RANKS[1]} processes: {largest:.3g}"
            )
    draw(curves, arguments.picture)
    return 0


if __name__ == "__main__":
    run_command(main, starts_processes=True)
