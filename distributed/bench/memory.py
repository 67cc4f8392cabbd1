"""What a rank holds under each engine, beside what arithmetic says: `python -m distributed.bench memory`.

As `python -m distributed.bench.memory JSON` on the ranks of one case it measures that case.
"""

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distributed.bench.rounds import machine

MIB = 2**20
MODEL, IMAGES, STEPS = "alexnet", 8, 3


class Case(NamedTuple):
    """An engine's settings, and the copies of the weights that it holds: on every rank, and shared out over the ranks."""

    settings: dict[str, Any]
    whole: int
    shared: int


# Weights, gradients and momentum are three; ZeRO 1 and 2, and 3 on a CPU, keep a copy of the weights to update.
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


def run(name: str, world_size: int) -> dict[str, float]:
    """MiB of the rank that held most.

    Raises:
        RuntimeError: the case failed, with the end of what it printed.
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--standalone"]
    command = [sys.executable, *launcher, "-m", "distributed.bench.memory", json.dumps(CASES[name].settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line.removeprefix("HELD ")) for line in done.stdout.splitlines() if line.startswith("HELD ")]
    if done.returncode or not found:
        raise RuntimeError(f"{name} on {world_size}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    one: dict[str, float] = found[0]
    return one


def table(json_file: Path | None) -> None:
    """Print each case as it is measured; write them all if a file is named."""
    print(f"{MODEL}, {IMAGES} images a step, float32; MiB of the rank that holds most")
    print(f"{'engine':<20} {'processes':>9} {'tensors':>9} {'arithmetic':>11} {'peak':>9} {'peak of a save':>15}")
    rows = []
    for name, case in CASES.items():
        for world_size in WORLD_SIZES if name == "ddp" else WORLD_SIZES[1:]:
            held = run(name, world_size)
            held["arithmetic"] = held["weights"] * (case.whole + case.shared / world_size)
            rows.append({"engine": name, "processes": world_size, **held})
            print(f"{name:<20} {world_size:>9} {held['tensors']:>9.0f} {held['arithmetic']:>11.0f} "
                  f"{held['peak']:>9.0f} {held['save']:>15.0f}", flush=True)  # fmt: skip
    if json_file:
        content = {"command": "python -m distributed.bench memory", "machine": machine(), "rows": rows}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n")


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Of this rank: bytes of tensors after a backward pass, when weights, gradients and momentum are all there; and the
    most resident memory while training and while saving, above that before the model was built."""
    import torch

    from distributed.build import build_data, build_engine
    from distributed.comm.process_group import process_group
    from distributed.config import TrainConfig
    from distributed.topology import Topology
    from distributed.training.steps import train_step
    from distributed.training.totals import MetricAccumulator

    data_settings = {"name": "generated10", "train_samples": IMAGES * STEPS, "test_samples": 10}
    config = TrainConfig.model_validate(
        {
            "model": {"name": MODEL}, "data": data_settings | {"validation_fraction": 0.0}, "device": "cpu",
            "global_batch_size": IMAGES, "precision": "float32", "schedule": {"name": "constant"}, **settings,
        }
    )  # fmt: skip
    topology, device = Topology.from_environment(), torch.device("cpu")
    torch.set_num_threads(1)
    with process_group(topology, device, timeout_seconds=120):
        data = build_data(config, topology, device)
        if config.engine.name == "deepspeed":
            import deepspeed  # noqa: F401  # its import is no part of the model
        _forget_peak()
        before = _resident("VmRSS")
        engine: Any = build_engine(config, topology, data, device)
        sums, step = MetricAccumulator(device), engine.step
        held = {"tensors": 0.0}

        def looked_at(lr: float, *, step_number: int) -> Any:
            held["tensors"] = max(held["tensors"], sum(_storages(engine)) / MIB)
            return step(lr, step=step_number)

        engine.step = lambda lr, *, step: looked_at(lr, step_number=step)
        for number, batches in enumerate(data.train_epoch(0)):
            train_step(engine, batches, loss=config.loss, lr=1e-4, step=number, metrics=sums)
        held["peak"] = _resident("VmHWM") - before
        _forget_peak()
        resting = _resident("VmRSS")
        copies = [tensor.to("cpu", copy=True) for _, tensor in engine.state() if topology.is_main]
        held["save"] = _resident("VmHWM") - resting
        held["weights"] = sum(t.nbytes for name, t in engine.state() if name.startswith("model.")) / MIB
        assert bool(copies) == topology.is_main
        from distributed.comm.collectives import gather_objects

        ranks: list[dict[str, float]] = gather_objects(held)
        return {key: max(rank[key] for rank in ranks) for key in held}


def _storages(engine: Any) -> Iterator[int]:
    """Bytes of every tensor's memory, each counted once."""
    import torch

    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects of torch complain of being looked at
        found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    found += [thing.grad for thing in found if thing.is_leaf and thing.grad is not None]
    for tensor in found:
        own = getattr(tensor, "_local_tensor", tensor)
        storage = own.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()


def _resident(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    outcome = measure(json.loads(sys.argv[1]))
    from distributed.topology import Topology

    if Topology.from_environment().is_main:
        print("HELD", json.dumps(outcome))
