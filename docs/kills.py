"""Draw docs/kills.png: one epoch on CIFAR-10, killed three times and resumed on other numbers of processes.

    python docs/kills.py --data.root FOLDER docs/kills.png

Needs a checkout and Linux (/proc). In each mode an undisturbed run on 2 processes is the reference.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = {"exact mode": "8", "fast mode": "0"}
REFERENCE = 2
LEGS = ((4, 88), (3, 168), (1, 248), (4, None))  # processes, and the step after which one of them is killed
SAVE_EVERY = 20


def logged_losses(run: Path) -> list[float]:
    """Return the logged training loss of every step so far."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line["loss"] for line in lines if line["kind"] == "train"]


def start(root: Path, run: Path, *, ranks: int, shards: str) -> subprocess.Popen[bytes]:
    """Start, or resume, one epoch of improved_alexnet on CIFAR-10."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone",
        "-m", "distributed.train", "--data.name", "cifar10", "--data.root", str(root), "--run_dir", str(run),
        "--epochs", "1", "--exact.shards", shards, "--checkpoint.every_steps", str(SAVE_EVERY),
        "--logging.every_steps", "1", "--logging.tensorboard", "false", "--device", "cpu",
    ]  # fmt: skip
    with run.with_suffix(".out").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def train_and_kill(root: Path, run: Path, *, shards: str) -> list[int]:
    """Run all legs, ending each but the last with kill -9 of one rank; return the steps that were resumed from."""
    for ranks, last in LEGS:
        torchrun = start(root, run, ranks=ranks, shards=shards)
        while last is not None and len(logged_losses(run)) < last and torchrun.poll() is None:
            time.sleep(0.02)
        if last is not None:
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
        if (torchrun.wait() == 0) != (last is None):
            raise SystemExit(f"{run}: torchrun ended with {torchrun.returncode}: {run.with_suffix('.out')}")
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [attempt["step"] for attempt in attempts if attempt["event"] == "started"][1:]


def draw(losses: dict[str, tuple[list[float], list[float]]], resumed: list[int], target: Path) -> None:
    """Draw the losses of the exact runs above, and the difference from the undisturbed run in both modes below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 4.6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    undisturbed, killed = losses["exact mode"]
    steps = range(1, len(undisturbed) + 1)
    above.plot(steps, undisturbed, color="tab:blue", linewidth=4, alpha=0.4, label="undisturbed, 2 processes")
    above.plot(steps, killed, color="black", linewidth=0.8, label="killed and resumed")
    borders = [0, *resumed, len(undisturbed)]
    for (ranks, last), left, right in zip(LEGS, borders[:-1], borders[1:], strict=True):
        above.text((left + right) / 2, 2.42, f"{ranks} process{'es' * (ranks > 1)}", ha="center", size=10)
        if last is not None:
            for panel in (above, below):
                panel.axvline(right, color="tab:red", linewidth=1, linestyle="--")
            above.annotate(
                f"kill -9,\nresumed at {right}", (right, 2.2), (4, 0), textcoords="offset points", color="tab:red", size=9,
                va="center",
            )  # fmt: skip
    above.set_ylim(top=2.5)
    above.set_ylabel("training loss")
    above.legend(loc="lower left", frameon=False, fontsize=9, handlelength=1.5)
    for mode, color, height in (("fast mode", "tab:orange", 2.2e-5), ("exact mode", "tab:blue", 1e-6)):
        difference = [abs(a - b) for a, b in zip(*losses[mode], strict=True)]
        below.plot(steps, difference, color=color, linewidth=1.6)
        label = "0 at every step" if max(difference) == 0 else f"up to {max(difference):.2g}"
        below.text(len(undisturbed) - 4, height, f"{mode}: {label}", color=color, ha="right", va="bottom", size=10)
    below.set_yscale("symlog", linthresh=1e-5, linscale=0.6)
    below.set_ylim(-2e-6, 1)
    below.set_yticks([0, 1e-4, 1e-2, 1], labels=["0", "0.0001", "0.01", "1"])
    below.set_ylabel("difference from the\nundisturbed run")
    below.set_xlabel("step")
    for panel in (above, below):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(0, len(undisturbed))
    figure.savefig(target, dpi=110)


def main() -> None:
    """Train four times, print the differences, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--data.root", dest="root", type=Path, default=Path("data"), help="folder with CIFAR-10")
    arguments = parser.parse_args()
    losses: dict[str, tuple[list[float], list[float]]] = {}
    resumed: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode, shards in MODES.items():
            reference, run = Path(folder) / f"{shards}-undisturbed", Path(folder) / f"{shards}-killed"
            start(arguments.root, reference, ranks=REFERENCE, shards=shards).wait()
            resumed[mode] = train_and_kill(arguments.root, run, shards=shards)
            losses[mode] = logged_losses(reference), logged_losses(run)
            difference = max(abs(a - b) for a, b in zip(*losses[mode], strict=True))
            print(
                f"{mode}: {len(losses[mode][0])} losses, resumed at steps {resumed[mode]}, at most {difference:.3g} apart"
            )
    draw(losses, resumed["exact mode"], arguments.picture)


if __name__ == "__main__":
    main()
