"""The large models in exact mode: two steps and an evaluation are bit-identical on one process and on three."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.precision import LOW
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config
from kit.traces import digest_of

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.topology import Topology
from distributed.training.losses import CROSS_ENTROPY, build_losses
from distributed.training.steps import evaluate, train_step
from distributed.training.totals import TotalsAccumulator
from distributed.training.views import Views

MODELS = ("alexnet", "cifar_alexnet", "cifar_alexnet_bn")
CPU = torch.device("cpu")


@in_group
def run_models() -> dict[str, dict[str, Any]]:
    topology = Topology(collectives.rank(), collectives.world_size())
    return {name: run_model(name, topology) for name in MODELS}


def run_model(name: str, topology: Topology) -> dict[str, Any]:
    config = small_config(
        Path("unused"),
        model={"name": name},
        precision=LOW,
        global_batch_size=9,
        data={"train_samples": 18, "test_samples": 10},
        exact={"shards": 4},
    )
    data = build_data(config, topology, CPU)
    engine = build_engine(config, topology, data, CPU)
    sums, steps = TotalsAccumulator(CPU), []
    for step, micro_batches in enumerate(data.train_epoch(0)):
        norm = train_step(
            engine, micro_batches, loss=build_losses(config.loss).training, lr=0.01, step=step, totals=sums
        )
        steps.append((float(norm), sums.read()))
    test = evaluate(engine, data, "test", loss=CROSS_ENTROPY, views=Views(), device=CPU)
    return {"steps": steps, "test": test, "tensors": {n: digest_of(tensor) for n, tensor in engine.state()}}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_large_models_are_bit_identical() -> None:
    (alone,) = run_ranks(run_models, 1, timeout_seconds=120)
    for name in MODELS:
        assert len(alone[name]["steps"]) == 2
        assert alone[name]["steps"][0] != alone[name]["steps"][1]
    for rank in run_ranks(run_models, 3, timeout_seconds=120):
        for name in MODELS:
            assert rank[name] == alone[name], name
