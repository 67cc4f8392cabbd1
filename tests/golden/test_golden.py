"""A recorded loss curve, which changes only when a change is meant to alter the numbers.

Record it again after such a change: python tests/golden/test_golden.py
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import pytest

from distributed.config import from_command_line
from distributed.metrics.records import EpochMetrics, TrainMetrics
from distributed.recipe import train

RECORDED = Path(__file__).with_name("debug_loss.json")
SETTINGS = (
    "configs/debug.toml", "--device", "cpu", "--precision", "float64", "--logging.every_steps", "1", "--grad_accum_steps", "2",
)  # fmt: skip


class Losses:
    """A sink that records the training and validation losses in order."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log_step(self, metrics: TrainMetrics) -> None:
        self.losses.append(metrics.loss)

    def log_epoch(self, metrics: EpochMetrics) -> None:
        assert metrics.validation is not None
        self.losses.append(metrics.validation.loss)

    def close(self) -> None:
        pass


def losses(run_dir: Path, shards: str = "auto") -> list[float]:
    root = Path(__file__).parents[2]
    arguments = [str(root / SETTINGS[0]), *SETTINGS[1:], "--exact.shards", shards, "--run_dir", str(run_dir)]
    config = from_command_line(arguments).config
    sink = Losses()
    train(config, sinks=[sink])
    return sink.losses


@pytest.mark.usefixtures("restore_threads_and_log")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("shards", ["0", "auto"])
def test_the_loss_curve_is_the_recorded_one(tmp_path: Path, shards: str) -> None:
    """Fast mode and exact mode compute the same mathematics."""
    recorded = json.loads(RECORDED.read_text())
    found = losses(tmp_path / "run", shards)
    assert len(found) == len(recorded)
    differing = [
        step for step, (a, b) in enumerate(zip(found, recorded, strict=True)) if not math.isclose(a, b, rel_tol=1e-9)
    ]
    assert differing == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        RECORDED.write_text(json.dumps(losses(Path(folder) / "run"), indent=0) + "\n")
    print(f"recorded {RECORDED}", file=sys.stderr)
