"""`python -m distributed.bench.compression --data.root FOLDER RESULTS.json`: cost and benefit of compressed gradients.

Measures on two processes: test accuracy after some epochs of configs/cifar10.toml, the bytes a rank passes to all-reduce per
step, and the step time in interleaved rounds.
"""

import argparse
import json
import re
import statistics
import subprocess
import tempfile
from operator import sub
from pathlib import Path
from typing import Any

from distributed.bench.machine import machine
from distributed.bench.training_speed import MODULES
from distributed.bench.workload import Workload
from distributed.data.sources import cifar
from distributed.errors import prints_errors
from distributed.files import home_path
from distributed.process.output_file import check_writable
from distributed.process.streams import run_command
from distributed.process.torchrun import torchrun_command
from distributed.run.folder import RunFolder

COMPRESSIONS = ("none", "bfloat16")
RANKS = 2


def _settings(root: Path, run_dir: Path, epochs: int, compression: str) -> list[str]:
    paths = ["--data.root", str(root), "--run_dir", str(run_dir)]
    return [
        "cifar10", *paths, "--logging.tensorboard", "false", "--device", "cpu", "--epochs", str(epochs),
        "--exact.shards", "0", "--engine.compression", compression,
    ]  # fmt: skip


def accuracy_and_bytes(root: Path, run_dir: Path, *, epochs: int, compression: str) -> dict[str, float]:
    """Train, and return the test accuracy after each epoch and the bytes that a rank sent per step.

    Raises:
        RuntimeError: training failed; the message has the end of its output.
    """
    command = torchrun_command(RANKS, "distributed.train", _settings(root, run_dir, epochs, compression))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{compression}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in RunFolder(run_dir).metrics_file.read_text().splitlines()]
    logged = "".join(path.read_text() for path in sorted(run_dir.rglob("*.log")))
    reduced = re.search(r"gradients: ([\d,]+) bytes summed", logged)
    assert reduced is not None
    found = {f"test accuracy, epoch {e['epoch'] + 1}": e["test"]["accuracy"] for e in lines if e["kind"] == "epoch"}
    return {**found, "bytes per step": int(reduced[1].replace(",", ""))}


def step_times(root: Path, *, steps: int) -> dict[str, float]:
    """Measure one round, and return each compression's step time in ms: the tenth percentile of its steps.

    The two ranks wait for each other, so other load on the machine shifts the median by far more than compression does.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for compression in COMPRESSIONS:
            arguments = [*_settings(root, Path(folder) / compression, 1, compression), "--threads", "1"]
            training = Workload(f"{MODULES}.this_project:run", {"arguments": arguments}, steps, ranks=RANKS)
            times = [at for _, at in training.measure().readings]
            found[compression] = 1000 * statistics.quantiles(map(sub, times[1:], times), n=10)[0]
    return found


@prints_errors
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m distributed.bench.compression", description=__doc__)
    parser.add_argument("results", type=home_path)
    parser.add_argument("--data.root", dest="root", type=home_path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80, help="steps per compression and round")
    arguments = parser.parse_args()
    cifar.check("cifar10", arguments.root)
    check_writable("RESULTS.json", arguments.results)
    epochs, steps, root = arguments.epochs, arguments.steps, arguments.root.resolve()
    rounds = [step_times(root, steps=steps) for _ in range(arguments.rounds)]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for compression in COMPRESSIONS:
            found[compression] = {
                **accuracy_and_bytes(root, Path(folder) / compression, epochs=epochs, compression=compression),
                "ms per step": min(times[compression] for times in rounds),
                "step time relative to none, by round": sorted(times[compression] / times["none"] for times in rounds),
            }
            print(compression, json.dumps(found[compression]), flush=True)
    command = f"python -m distributed.bench.compression --epochs {epochs} --rounds {arguments.rounds} --steps {steps}"
    content = {"command": command, "machine": machine(), "ranks": RANKS, "compressions": found, "rounds": rounds}
    arguments.results.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main, starts_processes=True)
