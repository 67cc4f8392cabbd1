"""`python -m distributed.bench.compression --data.root FOLDER FIGURES.json`: what compressed gradients cost and save, on two
processes: accuracy after some epochs of configs/cifar10.toml, bytes that a rank hands to all-reduces a step, and the time of a
step in interleaved rounds."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from operator import sub
from pathlib import Path
from typing import Any

from distributed.bench.rounds import Contender, machine
from distributed.files import home_path
from distributed.process.streams import run_command
from distributed.run.folder import RunFolder

WAYS = {
    "none": [],
    "bfloat16": ["--engine.compression", "bfloat16"],
}
RANKS = 2


def _settings(root: Path, run_dir: Path, epochs: int, way: str) -> list[str]:
    where = ["--data.root", str(root), "--run_dir", str(run_dir), "--logging.tensorboard", "false", "--device", "cpu"]
    return ["cifar10", *where, "--epochs", str(epochs), "--exact.shards", "0", *WAYS[way]]


def trained(root: Path, run_dir: Path, *, epochs: int, way: str) -> dict[str, float]:
    """Test accuracy after each epoch, and bytes a step, of a whole run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={RANKS}", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "distributed.train", *_settings(root, run_dir, epochs, way)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{way}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in RunFolder(run_dir).metrics_file.read_text().splitlines()]
    told = "".join(path.read_text() for path in sorted(run_dir.rglob("*.log")))
    sent = re.search(r"gradients: ([\d,]+) bytes all-reduced a step", told)
    assert sent is not None
    found = {f"test accuracy, epoch {e['epoch'] + 1}": e["test"]["accuracy"] for e in lines if e["kind"] == "epoch"}
    return {**found, "bytes a step": int(sent[1].replace(",", ""))}


def step_times(root: Path, *, steps: int) -> dict[str, float]:
    """A round: milliseconds a step of each way, one after another. Of a run's steps the fastest tenth's last: two ranks wait
    for one another, so that whoever else uses the machine moves the median by far more than what is measured."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            arguments = [*_settings(root, Path(folder) / way, 1, way), "--threads", "1"]
            ours = Contender("distributed.bench.contenders:ours", {"arguments": arguments}, steps, ranks=RANKS)
            clock = [at for _, at in ours.measure().readings]
            found[way] = 1000 * statistics.quantiles(map(sub, clock[1:], clock), n=10)[0]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m distributed.bench.compression", description=__doc__)
    parser.add_argument("figures", type=home_path)
    parser.add_argument("--data.root", dest="root", type=home_path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80, help="steps a way and round")
    given = parser.parse_args()
    root = given.root.resolve()
    rounds = [step_times(root, steps=given.steps) for _ in range(given.rounds)]
    ways: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            ratios = [r[way] / r["none"] for r in rounds]
            ways[way] = {
                **trained(root, Path(folder) / way, epochs=given.epochs, way=way),
                "ms a step": min(r[way] for r in rounds),
                "step time of none's, all rounds": sorted(ratios),
            }
            print(way, json.dumps(ways[way]), flush=True)
    command = (
        f"python -m distributed.bench.compression --epochs {given.epochs} --rounds {given.rounds} --steps {given.steps}"
    )
    content = {"command": command, "machine": machine(), "ranks": RANKS, "ways": ways, "rounds": rounds}
    given.figures.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
