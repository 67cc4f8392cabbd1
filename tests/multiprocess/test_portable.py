"""Any engine, at any world size, resumes any other engine's checkpoint, with bit-identical tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.engines import built, config_with, steps
from kit.ranks import in_group, run_ranks
from kit.traces import digest_of
from safetensors.torch import load_file

from distributed.checkpoint.tensor_file import write_tensors
from distributed.comm import collectives
from distributed.engine.protocol import Engine

ENGINES = ["ddp", "fsdp", "zero 1", "zero 2", "zero 3"]
WORLD_SIZES = [1, 2, 4]
SETTINGS: dict[str, Any] = {
    # 10 classes: the size of the last layer's bias and of its momentum is divisible by 2, but not by 4.
    "sgd": {"global_batch_size": 6, "optim": {"max_grad_norm": 0.5}, "data": {"train_samples": 30}},
    "adamw": {
        "global_batch_size": 6,
        "optim": {"name": "adamw", "ema_decay": 0.9},
        "data": {"train_samples": 30},
    },
}
LR = {"sgd": 0.01, "adamw": 1e-6}
SOURCES = {"sgd": [4], "adamw": [1, 4]}
"""World sizes that save the checkpoints."""
SAVED_AFTER = FOLLOWED = 2
"""Steps: the first loss after a load depends on the weights only, the second also on the optimizer's tensors."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def name_of(optim: str, engine: str, world_size: int) -> str:
    return f"{optim}, {engine}, {world_size}"


def engines_on(world_size: int) -> list[str]:
    """Return the engines to test; on one process nothing is sharded, so all of them are the same."""
    return ["ddp", "zero 3"] if world_size == 1 else ENGINES


def sources(folder: Path, optim: str) -> list[Path]:
    names = [name_of(optim, engine, size) for size in SOURCES[optim] for engine in engines_on(size)]
    return [folder / f"{name}.safetensors" for name in names]


def digests(engine: Engine) -> dict[str, str]:
    return {name: digest_of(tensor) for name, tensor in engine.state()}


@in_group
def save_all(folder: Path) -> None:
    """With every engine: take two steps, save, and write the losses of the next two."""
    for optim, settings in SETTINGS.items():
        for name in engines_on(collectives.world_size()) if collectives.world_size() in SOURCES[optim] else ():
            config = config_with(name, **settings)
            engine, data = built(config)
            steps(engine, data, config, lr=LR[optim], count=SAVED_AFTER)
            tensors = {key: tensor.clone() for key, tensor in engine.state()}
            losses, _ = steps(engine, data, config, lr=LR[optim], first=SAVED_AFTER, count=FOLLOWED)
            if collectives.rank() == 0:
                path = folder / name_of(optim, name, collectives.world_size())
                write_tensors(path.with_suffix(".safetensors"), tensors)
                path.with_suffix(".json").write_text(json.dumps(losses))


@in_group
def load_all(folder: Path) -> dict[tuple[str, str, str], tuple[list[str], list[float]]]:
    """Return, by (optimizer, engine, checkpoint), the tensors that differ from the saved ones and the next two losses."""
    found = {}
    for optim, settings in SETTINGS.items():
        saved = {path: load_file(path) for path in sources(folder, optim)}
        expected = {
            path: {key: digest_of(tensor) for key, tensor in tensors.items()} for path, tensors in saved.items()
        }
        for name in engines_on(collectives.world_size()):
            config = config_with(name, **settings)
            engine, data = built(config)
            for path, tensors in saved.items():
                engine.load_state(tensors)
                loaded = digests(engine)
                wrong = [key for key in loaded.keys() | tensors.keys() if loaded.get(key) != expected[path].get(key)]
                losses, _ = steps(engine, data, config, lr=LR[optim], first=SAVED_AFTER, count=FOLLOWED)
                found[optim, name, path.stem] = wrong, losses
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for world_size in sorted({size for sizes in SOURCES.values() for size in sizes}):
        run_ranks(save_all, world_size, folder, timeout_seconds=200)
    return folder


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_engine_resumes_every_engines_checkpoint(saved: Path, world_size: int) -> None:
    first, *others = run_ranks(load_all, world_size, saved, timeout_seconds=500)
    assert all(other == first for other in others)
    checkpoints = sum(len(engines_on(size)) for sizes in SOURCES.values() for size in sizes)
    assert len(first) == len(engines_on(world_size)) * checkpoints
    worst = 0.0
    for (optim, engine, source), (wrong, losses) in first.items():
        assert not wrong, f"{source} in {engine} on {world_size}: {wrong}"
        expected = json.loads((saved / f"{source}.json").read_text())
        if source == name_of(optim, engine, world_size):
            assert losses == expected, "same engine and world size, but the losses differ"
        worst = max(worst, *(abs(a - b) / b for a, b in zip(losses, expected, strict=True)))
    print(f"\nin {len(first)} pairs on {world_size} processes the next losses are within {worst:.1e}")
    assert worst < 1e-5


def test_negative_zeros_survive_a_save(tmp_path: Path) -> None:
    for tensors in run_ranks(with_negative_zeros, 2, timeout_seconds=120):
        assert tensors == [], tensors


@in_group
def with_negative_zeros() -> list[str]:
    """Load tensors that are all -0.0; return the names of those that are not when gathered again."""
    wrong = []
    for name in ENGINES:
        engine, _ = built(config_with(name))
        zeros = {key: -torch.zeros_like(tensor) for key, tensor in engine.state() if tensor.is_floating_point()}
        rest = {key: tensor.clone() for key, tensor in engine.state() if not tensor.is_floating_point()}
        engine.load_state(zeros | rest)
        wrong += [f"{name}: {key}" for key, tensor in engine.state() if key in zeros and not tensor.signbit().all()]
    return wrong
