"""Training runs of a step: their command lines, what they logged, whether two have the same bits."""

from pathlib import Path
from typing import Any

import torch

from distributed.checkpoint.tensor_file import read_tensors, tensor_digest
from distributed.files import read_object
from distributed.run.checkpoint_layout import checkpoints
from distributed.run.folder import RunFolder
from distributed.run.records import read_metrics

_OF_THE_MACHINE = {"images_per_second", "data_wait", "memory_mib", "eta_seconds", "seconds"}


def arguments(run: Path, device: torch.device, **settings: object) -> list[str]:
    """Arguments of `python -m distributed.train` for improved_alexnet on generated images; a setting's dots are written as
    two underscores, e.g. `exact__shards=8`."""
    values: dict[str, object] = {
        "run_dir": run, "device": device.type, "timeout_seconds": 20, "data__name": "generated10",
        "logging__tensorboard": "false", "checkpoint__every_minutes": 0,
    }  # fmt: skip
    values |= settings
    return [word for name, value in values.items() for word in (f"--{name.replace('__', '.')}", str(value))]


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock and the machine say."""
    records = read_metrics(RunFolder(run).metrics_file)
    return [record.model_dump(exclude_unset=True, exclude=_OF_THE_MACHINE) for record in records]


def training_steps(run: Path) -> list[dict[str, Any]]:
    """Those of `logged` that are of training steps."""
    return [line for line in logged(run) if line["kind"] == "train"]


def losses(run: Path) -> list[float]:
    """The training losses logged, in order of steps."""
    return [line["loss"] for line in training_steps(run)]


def step_logged(run: Path) -> int:
    """The last step that the run has logged; 0 before the first."""
    return max((record.step for record in read_metrics(RunFolder(run).metrics_file)), default=0)


def saved_state(run: Path) -> dict[str, Any]:
    """Counters, schedule and sums in the newest checkpoint; empty where there is none."""
    saved = checkpoints(RunFolder(run).checkpoints)
    return dict(read_object(saved[-1] / "state.json")["state"]) if saved else {}


def saved_digests(run: Path) -> dict[str, str]:
    """A digest of each tensor in the newest checkpoint: weights, buffers, momentum."""
    newest = checkpoints(RunFolder(run).checkpoints)[-1]
    return {name: tensor_digest(tensor) for name, tensor in read_tensors(newest).items()}


def assert_finished(run: Path) -> None:
    """Raises AssertionError if the run has not trained to its end."""
    status = RunFolder(run).status()
    assert status.status == "finished", f"{run.name}: {status.as_json() or 'never began'}"


def assert_same_bits(run: Path, reference: Path) -> int:
    """How many tensors were compared.

    Raises:
        AssertionError: a run is not finished; its logged figures or final tensors are not those of the other, bit for bit.
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
