"""`python -m distributed.bench memory`: compares the memory of a rank under each engine with the expected amount.

`python -m distributed.bench.memory JSON_SETTINGS`, on the ranks of one case, measures that case.
"""

import gc
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distributed.bench.machine import machine
from distributed.bench.workload import run
from distributed.process.optional_output import requested_output
from distributed.process.output_file import write_output
from distributed.process.torchrun import torchrun_command

MIB = 2**20
MODEL, IMAGES, STEPS = "alexnet", 8, 3


class Memory(NamedTuple):
    """Memory in MiB, the maximum over the ranks.

    Attributes:
        tensors: all tensors after a backward pass, when weights, gradients and momentum exist.
        peak: peak of resident memory while training, above what was resident before the model was built.
        save: the same while saving, above what was resident before the save.
        weights: the model's weights.
    """

    tensors: float
    peak: float
    save: float
    weights: float


class Case(NamedTuple):
    """An engine's settings, and how many copies of the weights it stores: on every rank, and sharded over the ranks."""

    settings: dict[str, Any]
    replicated: int
    sharded: int


# Weights, gradients and momentum are three copies. ZeRO stages 1 and 2, on a CPU also 3, update another copy of the weights.
CASES = {
    "ddp": Case({"engine": {"name": "ddp"}, "exact": {"shards": 0}}, 3, 0),
    "fsdp": Case({"engine": {"name": "fsdp"}, "exact": {"shards": 0}}, 0, 3),
    "fsdp, exact mode": Case({"engine": {"name": "fsdp"}, "exact": {"shards": 4}}, 0, 3),
    "deepspeed, stage 0": Case({"engine": {"name": "deepspeed", "zero_stage": 0}}, 3, 0),
    "deepspeed, stage 1": Case({"engine": {"name": "deepspeed", "zero_stage": 1}}, 2, 2),
    "deepspeed, stage 2": Case({"engine": {"name": "deepspeed", "zero_stage": 2}}, 1, 3),
    "deepspeed, stage 3": Case({"engine": {"name": "deepspeed", "zero_stage": 3}}, 0, 4),
}
WORLD_SIZES = (1, 2, 4)


def measure_all(json_file: Path | None) -> None:
    """Print each case as it is measured, and write all of them to `json_file` if given."""
    print(f"{MODEL}, {IMAGES} images per step, float32; MiB, maximum over the ranks")
    print(f"{'engine':<20} {'processes':>9} {'tensors':>9} {'arithmetic':>11} {'peak':>9} {'peak of a save':>15}")
    rows = []
    for name, case in CASES.items():
        for world_size in WORLD_SIZES if name == "ddp" else WORLD_SIZES[1:]:
            found = run_case(name, world_size)
            arithmetic = found.weights * (case.replicated + case.sharded / world_size)
            rows.append({"engine": name, "processes": world_size, **found._asdict(), "arithmetic": arithmetic})
            print(f"{name:<20} {world_size:>9} {found.tensors:>9.0f} {arithmetic:>11.0f} "
                  f"{found.peak:>9.0f} {found.save:>15.0f}", flush=True)  # fmt: skip
    if json_file:
        content = {"command": "python -m distributed.bench memory", "machine": machine(), "rows": rows}
        with requested_output("--json", json_file):
            write_output(json_file, (json.dumps(content, indent=1) + "\n").encode())


def run_case(name: str, world_size: int) -> Memory:
    """Measure a case on `world_size` processes.

    Raises:
        RuntimeError: the case failed; the message has the end of its output.
    """
    command = torchrun_command(world_size, "distributed.bench.memory", [json.dumps(CASES[name].settings)])
    code, printed, errors = run(command)
    lines = [line for line in printed.splitlines() if line.startswith("MEMORY ")]
    if code or not lines:
        raise RuntimeError(f"{name} on {world_size} processes: exit code {code}\n{errors[-3000:]}")
    return Memory(**json.loads(lines[0].removeprefix("MEMORY ")))


def measure(settings: dict[str, Any]) -> Memory:
    """Train for a few steps and save, on this rank of a group."""
    import torch

    from distributed.build import build_data, build_engine
    from distributed.comm.collectives import gather_objects
    from distributed.comm.process_group import process_group
    from distributed.topology import Topology

    config, topology, device = _config(settings), Topology.from_environment(), torch.device("cpu")
    torch.set_num_threads(1)
    with process_group(topology, device, timeout_seconds=120):
        data = build_data(config, topology, device)
        if config.engine.name == "deepspeed":
            import deepspeed  # noqa: F401  # first, so that its own memory is not measured
        _reset_peak()
        before = _resident("VmRSS")
        engine: Any = build_engine(config, topology, data, device)
        tensors = _train(config, engine, data, device)
        peak = _resident("VmHWM") - before
        _reset_peak()
        before = _resident("VmRSS")
        copies = [tensor.to("cpu", copy=True) for _, tensor in engine.state() if topology.is_main]
        save = _resident("VmHWM") - before
        weights = sum(t.nbytes for name, t in engine.state() if name.startswith("model.")) / MIB
        assert bool(copies) == topology.is_main
        ranks: list[tuple[float, ...]] = gather_objects((tensors, peak, save, weights))
        return Memory(*map(max, zip(*ranks, strict=True)))


def _config(settings: dict[str, Any]) -> Any:
    from distributed.config import TrainConfig

    data = {"name": "generated10", "train_samples": IMAGES * STEPS, "test_samples": 10, "validation_fraction": 0.0}
    return TrainConfig.model_validate(
        {
            "model": {"name": MODEL}, "data": data, "device": "cpu", "global_batch_size": IMAGES,
            "precision": "float32", "schedule": {"name": "constant"}, **settings,
        }
    )  # fmt: skip


def _train(config: Any, engine: Any, data: Any, device: Any) -> float:
    """Train for an epoch, and return the largest size of all tensors just before an update, in MiB."""
    from distributed.training.losses import build_losses
    from distributed.training.steps import train_step
    from distributed.training.totals import TotalsAccumulator

    totals, update = TotalsAccumulator(device), engine.step
    sizes = []

    def step_and_measure(lr: float, *, step: int) -> Any:
        sizes.append(sum(_storages()) / MIB)
        return update(lr, step=step)

    engine.step = step_and_measure
    for number, batches in enumerate(data.train_epoch(0)):
        train_step(engine, batches, loss=build_losses(config.loss).training, lr=1e-4, step=number, totals=totals)
    return max(sizes)


def _storages() -> Iterator[int]:
    """Yield the size in bytes of the memory of every tensor in the process, each storage once."""
    import torch

    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of torch's objects warn when they are inspected
        found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    found += [thing.grad for thing in found if thing.is_leaf and thing.grad is not None]
    for tensor in found:
        local = getattr(tensor, "_local_tensor", tensor)
        storage = local.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()


def _resident(field: str) -> float:
    """Return resident memory in MiB: `VmRSS`, now, or `VmHWM`, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    outcome = measure(json.loads(sys.argv[1]))
    from distributed.topology import Topology

    if Topology.from_environment().is_main:
        print("MEMORY", json.dumps(outcome._asdict()))
