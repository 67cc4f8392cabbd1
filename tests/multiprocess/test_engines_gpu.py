"""Sharded engines on CUDA over NCCL, in a single process, since NCCL does not support two ranks on one GPU."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.engines import ENGINES, copied, difference, steps
from kit.ranks import run_ranks
from kit.small_runs import FAST, small_config

from distributed.build import build_data, build_engine
from distributed.comm.process_group import choose_device, process_group
from distributed.config.engines import DeepSpeed
from distributed.engine.deepspeed import DeepSpeedEngine
from distributed.engine.fsdp import FsdpEngine
from distributed.engine.prepare import Compute
from distributed.engine.protocol import Engine
from distributed.network import build_network
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def needs(name: str) -> list[pytest.MarkDecorator]:
    missing = name.startswith("zero") and find_spec("deepspeed") is None
    return [pytest.mark.skipif(missing, reason="deepspeed is not installed")]


def on_cuda(name: str, precision: str) -> tuple[list[float], dict[str, Any]]:
    """Return losses and state after three steps; sharded engines are built directly, although there is nothing to shard."""
    topology = Topology.from_environment()
    device = choose_device("cuda", topology)
    make_deterministic(device, precision="float32")
    settings = {"engine": ENGINES[name], "exact": FAST, "channels_last": False, "device": "cuda"}
    config = small_config(Path("unused"), precision=precision, **settings)
    with process_group(topology, device, timeout_seconds=60):
        data = build_data(config, topology, device)
        model, layers, _ = build_network(config, topology, data)
        compute = Compute(precision, channels_last=False, device=device, timeout_seconds=60.0)
        engine: Engine
        if isinstance(config.engine, DeepSpeed):
            engine = DeepSpeedEngine(config.engine, model, optim=config.optim, compute=compute, grad_accum_steps=1)
        elif config.engine.name == "fsdp":
            engine = FsdpEngine(config.engine, model, optim=config.optim, compute=compute, layers=layers)
        else:
            engine = build_engine(config, topology, data, device)
        losses, _ = steps(engine, data, config, lr=0.01, count=3, device=device)
        return losses, {key: tensor.cpu() for key, tensor in copied(engine).items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ENGINES if name != "ddp"])
def test_three_steps_match_ddp(name: str, precision: str) -> None:
    ((expected, there),) = run_ranks(on_cuda, 1, "ddp", precision, timeout_seconds=150)
    ((losses, here),) = run_ranks(on_cuda, 1, name, precision, timeout_seconds=150)
    bound = 1e-5 if precision == "float32" else 2e-3
    assert losses == pytest.approx(expected, rel=bound)
    assert difference(here, there, "model") < bound
