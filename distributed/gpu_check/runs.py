"""Training runs started by a step: their command lines, what they logged, and whether two of them are bit-identical."""

from pathlib import Path
from typing import Any

import torch

from distributed.checkpoint.tensor_file import read_tensors, tensor_digest
from distributed.files import read_object
from distributed.run.checkpoint_layout import STATE, checkpoints
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import MACHINE_METRICS, read_metrics
from distributed.training.precision import fast_precision


def arguments(run: Path, device: torch.device, **settings: object) -> list[str]:
    """Return arguments of `python -m distributed.train` for improved_alexnet on generated images.

    Args:
        settings: further settings; two underscores stand for a dot, e.g. `exact__shards=8`.
    """
    values: dict[str, object] = {
        "run_dir": run, "device": device.type, "precision": fast_precision(device), "timeout_seconds": 20,
        "data__name": "generated10", "logging__tensorboard": "false", "checkpoint__every_minutes": 0,
    }  # fmt: skip
    values |= settings
    return [word for name, value in values.items() for word in (f"--{name.replace('__', '.')}", str(value))]


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without timings and memory."""
    records = read_metrics(RunFolder(run).metrics_file)
    return [record.model_dump(exclude_unset=True, exclude=MACHINE_METRICS) for record in records]


def training_steps(run: Path) -> list[dict[str, Any]]:
    """Return the lines of `logged` that belong to training steps."""
    return [line for line in logged(run) if line["kind"] == "train"]


def losses(run: Path) -> list[float]:
    """Return the logged training losses in order of steps."""
    return [line["loss"] for line in training_steps(run)]


def step_logged(run: Path) -> int:
    """Return the last logged step, 0 before the first."""
    return max((record.step for record in read_metrics(RunFolder(run).metrics_file)), default=0)


def saved_state(run: Path) -> dict[str, Any]:
    """Return counters, schedule and metric sums of the newest checkpoint; empty if there is none."""
    saved = checkpoints(RunFolder(run).checkpoints)
    return dict(read_object(saved[-1] / STATE)["state"]) if saved else {}


def saved_digests(run: Path) -> dict[str, str]:
    """Return a digest of each tensor in the newest checkpoint: weights, buffers, momentum."""
    newest = checkpoints(RunFolder(run).checkpoints)[-1]
    return {name: tensor_digest(tensor) for name, tensor in read_tensors(newest).items()}


def assert_finished(run: Path) -> None:
    """Raise AssertionError unless the run has finished."""
    status = RunFolder(run).status()
    assert status.status == "finished", f"{run.name}: {status.as_json() or 'never started'}"


def assert_same_bits(run: Path, reference: Path) -> int:
    """Compare two runs' logged figures and final tensors bit for bit, and return the number of tensors.

    Raises:
        AssertionError: a run is unfinished, or the two differ.
    """
    assert_finished(run)
    assert_finished(reference)
    names = f"{run.name} and {reference.name}"
    ours, theirs = logged(run), logged(reference)
    assert ours, f"{run.name} logged nothing"
    for a, b in zip(ours, theirs, strict=False):
        assert a == b, f"{names} differ: {a} | {b}"
    assert len(ours) == len(theirs), f"{names} logged {len(ours)} and {len(theirs)} lines"
    here, there = saved_digests(run), saved_digests(reference)
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    assert not different, f"{names} differ in {len(different)} of {len(there)} tensors: {different[:3]}"
    return len(here)
