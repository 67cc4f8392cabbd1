"""Everything that a run tells and leaves, to be compared to the last bit."""

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
    """All that a rank knows of a run: what its sinks were told, what was decided, a digest of every tensor at the end, and
    by which ways gradients and batch norm's rows went."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    decisions: list[str]
    tensors: dict[str, str]
    ended: tuple[int, int, bool]
    ways: frozenset[str]


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
        (state.epoch, state.step, state.stop_reason is not None),
        ways_of(engines[0]),
    )


def digest_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def ways_of(engine: Engine) -> frozenset[str]:
    if not isinstance(engine, ExactEngine):
        return frozenset({"fast"})
    rows = engine._lanes._gather.args[1]._gather
    of_rows = getattr(rows, "__name__", type(rows).__name__)
    return frozenset({of_rows, *(type(bucket.exchange).__name__ for bucket in engine._reduction._buckets)})


def tensors_of(run: RunFolder) -> dict[str, Tensor]:
    return load_file(newest_checkpoint(run.path) / "tensors.safetensors")


def digests_of(run: RunFolder) -> dict[str, dict[str, str]]:
    """The digests of the tensors at every save, by the name of its checkpoint."""
    return {line["name"]: line["tensors"] for line in map(json.loads, run.digests_file.read_text().splitlines())}


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """All that is written down of two runs: every logged figure, the tensors of every save, the state at the end."""
    for kind in ("train", "epoch"):
        assert lines(found, kind) == lines(expected, kind)
    here, there = digests_of(found), digests_of(expected)
    assert there.keys() <= here.keys(), "a stop saves besides the ends of epochs"
    assert {name: here[name] for name in there} == there
    assert newest_checkpoint(found.path).name == newest_checkpoint(expected.path).name
    tensors = tensors_of(found)
    assert tensors.keys() == tensors_of(expected).keys()
    assert [name for name, tensor in tensors_of(expected).items() if not torch.equal(tensors[name], tensor)] == []
    assert state_of(found) == state_of(expected)
