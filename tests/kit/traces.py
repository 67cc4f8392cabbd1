"""Everything that a run reports and writes, for bit-exact comparison."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from safetensors.torch import load_file
from torch import Tensor

from distributed import recipe
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.engine.exact import ExactEngine
from distributed.engine.protocol import Engine
from distributed.run.folder import RunFolder
from kit.small_runs import Recorder, StopAfter, lines, newest_checkpoint, state_of, without_clock


@dataclass(frozen=True)
class Trace:
    """Everything that one rank knows about a run."""

    steps: list[dict[str, Any]]
    """Metrics of each logged step, without those of the clock and the machine."""
    epochs: list[dict[str, Any]]
    decisions: list[str]
    """Log lines of the plateau schedule and early stopping."""
    tensors: dict[str, str]
    """Digests of the final state, by name."""
    final_epoch: int
    final_step: int
    stopped: bool
    """Whether the run was stopped before its last epoch."""
    transports: frozenset[str]
    """The classes that carried gradients and statistics rows in exact mode; in fast mode, {"fast"}."""


def traced(config: TrainConfig, stop_after: int | None = None) -> Trace:
    recorder, decisions, engines = Recorder(), list[str](), list[Engine]()
    sink = logger.add(
        lambda message: decisions.append(message.record["message"]),
        filter=lambda record: record["message"].startswith(("plateau:", "early stopping:")),
    )
    build = recipe.build_engine

    def build_engine(*arguments: Any) -> Engine:
        engines.append(build(*arguments))
        return engines[0]

    vars(recipe)["build_engine"] = build_engine
    try:
        stop = StopAfter(stop_after) if stop_after and collectives.rank() == 0 else None
        state = recipe.train(config, stop=stop, sinks=[recorder])
    finally:
        vars(recipe)["build_engine"] = build
        logger.remove(sink)
    return Trace(
        [without_clock(metrics) for metrics in recorder.steps],
        [without_clock(metrics) for metrics in recorder.epochs],
        decisions,
        {name: digest_of(tensor) for name, tensor in engines[0].state()},
        state.epoch,
        state.step,
        state.stop_reason is not None,
        transports_of(engines[0]),
    )


def digest_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def transports_of(engine: Engine) -> frozenset[str]:
    if not isinstance(engine, ExactEngine):
        return frozenset({"fast"})
    gather = engine._executor._gather.args[1]._gather
    gather_name = getattr(gather, "__name__", type(gather).__name__)
    return frozenset({gather_name, *(type(bucket.reduce).__name__ for bucket in engine._reducer._buckets)})


def tensors_of(run: RunFolder) -> dict[str, Tensor]:
    return load_file(newest_checkpoint(run.path) / "tensors.safetensors")


def digests_of(run: RunFolder) -> dict[str, dict[str, str]]:
    """Return the digests of the tensors of every save, by checkpoint name."""
    return {line["name"]: line["tensors"] for line in map(json.loads, run.digests_file.read_text().splitlines())}


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """Compare all that two runs have written: every logged metric, the tensors of every save, the final state."""
    for kind in ("train", "epoch"):
        assert lines(found, kind) == lines(expected, kind)
    digests, expected_digests = digests_of(found), digests_of(expected)
    assert expected_digests.keys() <= digests.keys(), "a stop saves in addition to the ends of epochs"
    assert {name: digests[name] for name in expected_digests} == expected_digests
    assert newest_checkpoint(found.path).name == newest_checkpoint(expected.path).name
    tensors = tensors_of(found)
    assert tensors.keys() == tensors_of(expected).keys()
    assert [name for name, tensor in tensors_of(expected).items() if not torch.equal(tensors[name], tensor)] == []
    assert state_of(found) == state_of(expected)
