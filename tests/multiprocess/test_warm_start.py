"""Weights of a file on several ranks, under all engines; ranks with other files or other modules are refused."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.ranks import in_group, run_ranks
from kit.small_runs import digest, newest_checkpoint, small_config
from kit.tied_network import Tied
from safetensors.torch import load_file, save_file
from torch import Tensor

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.errors import InputError
from distributed.models.build import build_model
from distributed.network import build_initial_network
from distributed.recipe import train
from distributed.run.checkpoint_layout import TENSORS
from distributed.topology import Topology

CPU = torch.device("cpu")
TIED = "kit.tied_network:Tied"


def write_weights(path: Path, model: str) -> dict[str, Tensor]:
    """Write weights of a network that no seed draws."""
    network = Tied(10) if model == TIED else build_model(small_config(Path()).model, num_classes=10, seed=0)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for index, tensor in enumerate(tensors.values()):
        tensor.fill_(index + 1)
    if model == TIED:
        tensors["decode.weight"].copy_(tensors["encode.weight"])
        tensors["first"].copy_(tensors["scale"][:1])
    save_file(tensors, path)
    return tensors


@in_group
def engine_state(cases: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    found, topology = [], Topology(collectives.rank(), collectives.world_size())
    for path, case in cases:
        config = small_config(path.parent / "run", init_from=path, **case)
        data = build_data(config, topology, CPU)
        network = build_initial_network(config, topology, data)
        found.append({name: t.clone() for name, t in build_engine(config, topology, data, CPU, network).state()})
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_engine_starts_from_a_file(world_size: int, tmp_path: Path) -> None:
    files = {model: tmp_path / f"{place}.safetensors" for place, model in enumerate(("improved_alexnet", TIED))}
    written = {file: write_weights(file, model) for model, file in files.items()}
    settings = [
        {"engine": {"name": engine}, "exact": {"shards": shards}, "optim": {"ema_decay": 0.9}}
        for engine in ("ddp", "fsdp")
        for shards in (0, 4)
    ]
    cases = [(file, {"model": {"name": model}, **each}) for model, file in files.items() for each in settings]
    for states in run_ranks(engine_state, world_size, cases, timeout_seconds=300):
        for (file, _), found in zip(cases, states, strict=True):
            for name, tensor in written[file].items():
                assert torch.equal(found[f"model.{name}"].cpu(), tensor), name
                if f"ema.{name}" in found:
                    assert torch.equal(found[f"ema.{name}"].cpu(), tensor), name
            assert not any(t.any() for name, t in found.items() if name.startswith("optimizer."))


@in_group
def trained_bits(run_dir: Path, path: Path) -> None:
    train(small_config(run_dir, epochs=1, exact={"shards": 4}, init_from=path))


def test_exact_mode_has_the_same_bits_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_model(small_config(Path()).model, num_classes=10, seed=5)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    found = {}
    for world_size in (1, 3):
        run_ranks(trained_bits, world_size, tmp_path / str(world_size), tmp_path / "w.safetensors", timeout_seconds=180)
        found[world_size] = digest(newest_checkpoint(tmp_path / str(world_size)) / TENSORS)
    assert found[1] == found[3]
    run_ranks(trained_bits, 1, tmp_path / "random", None, timeout_seconds=180)
    assert digest(newest_checkpoint(tmp_path / "random") / TENSORS) != found[1]


@in_group
def refused(folder: Path, settings: dict[str, Any]) -> str:
    own = folder / f"rank{collectives.rank()}"
    os.chdir(own)
    sys.path.insert(0, str(own))
    with pytest.raises(InputError) as caught:
        train(small_config(folder / "run", **settings))
    return str(caught.value)


def test_ranks_with_other_files_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        tensors = write_weights(tmp_path / f"rank{rank}/w.safetensors", "improved_alexnet")
    tensors["fc3.bias"][4] += 1
    save_file(tensors, tmp_path / "rank1/w.safetensors")
    messages = set(run_ranks(refused, 2, tmp_path, {"init_from": Path("w.safetensors")}, timeout_seconds=120))
    assert messages == {
        "init_from = w.safetensors: rank 1's initial weights differ from rank 0's, e.g. fc3.bias; every node needs the "
        "same file, and the same module if the network is imported"
    }
    assert load_file(tmp_path / "rank0/w.safetensors").keys() == tensors.keys()


def test_ranks_with_other_modules_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        module = f"from torch import nn\n\n\ndef make(num_classes):  # {rank}\n    return nn.Sequential(nn.Flatten(), "
        (tmp_path / f"rank{rank}/net_zq.py").write_text(f"{module}nn.Linear(3072, num_classes))\n")
    messages = set(run_ranks(refused, 2, tmp_path, {"model": {"name": "net_zq:make"}}, timeout_seconds=120))
    [message] = messages
    assert message.startswith("model.name = net_zq:make: rank 1 has a different ")
    assert message.endswith("net_zq.py from rank 0; every node needs the same file")


@in_group
def resumed_build(path: Path, run: Path) -> None:
    """Build as on a rank that looked for a checkpoint before rank 0 had the lock, and one that looked after."""
    config = small_config(run, init_from=path, data={"train_samples": 24})
    network = build_initial_network(config, Topology(collectives.rank(), 2), build_data(config, Topology(), CPU))
    torch.nn.init.constant_(network.model.get_parameter("fc3.bias"), collectives.rank())
    build_engine(config, Topology(collectives.rank(), 2), build_data(config, Topology(), CPU), CPU, network)


def test_a_resume_during_the_first_save_is_not_refused(tmp_path: Path) -> None:
    save_file(build_model(small_config(Path()).model, num_classes=10, seed=1).state_dict(), tmp_path / "w.safetensors")
    train(small_config(tmp_path / "run", epochs=1, init_from=tmp_path / "w.safetensors", data={"train_samples": 24}))
    run_ranks(resumed_build, 2, tmp_path / "w.safetensors", tmp_path / "run")
