"""Sharded engines on CUDA over NCCL. One process: NCCL takes no two of them on one GPU, and one GPU is what is lent."""

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
from distributed.engine.protocol import Engine
from distributed.models.build import build_model
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
    """(losses, state after three steps), the engine itself being made even where there is nothing to be shared out"""
    topology = Topology.from_environment()
    device = choose_device("cuda", topology)
    make_deterministic(device, precision="float32")
    settings = {"engine": ENGINES[name], "exact": FAST, "channels_last": False, "device": "cuda"}
    config = small_config(Path("unused"), precision=precision, **settings)
    with process_group(topology, device, timeout_seconds=60):
        data = build_data(config, topology, device)
        model = build_model(config.model, num_classes=data.num_classes, seed=config.seed)
        common: dict[str, Any] = {
            "optim": config.optim, "precision": precision, "channels_last": False, "device": device,
            "timeout_seconds": 60.0,
        }  # fmt: skip
        engine: Engine
        if isinstance(config.engine, DeepSpeed):
            engine = DeepSpeedEngine(config.engine, model, grad_accum_steps=1, **common)
        elif config.engine.name == "fsdp":
            engine = FsdpEngine(config.engine, model, **common)
        else:
            engine = build_engine(config, topology, data, device)
        losses, _ = steps(engine, data, config, lr=0.01, count=3, device=device)
        return losses, {key: tensor.cpu() for key, tensor in copied(engine).items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ENGINES if name != "ddp"])
def test_three_steps_are_those_of_ddp(name: str, precision: str) -> None:
    ((expected, there),) = run_ranks(on_cuda, 1, "ddp", precision, timeout_seconds=150)
    ((losses, here),) = run_ranks(on_cuda, 1, name, precision, timeout_seconds=150)
    bound = 1e-5 if precision == "float32" else 2e-3
    assert losses == pytest.approx(expected, rel=bound)
    assert difference(here, there, "model") < bound
