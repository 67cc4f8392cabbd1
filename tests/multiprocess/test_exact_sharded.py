"""Exact mode with sharded weights: bit-identical to replicated weights on one process, and memory per rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config
from kit.traces import Trace, assert_same_run, traced
from torch import nn

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.comm.process_group import choose_device
from distributed.config import TrainConfig
from distributed.data.batch import Batch
from distributed.exact.sharded_weights import ShardedWeights
from distributed.models.keyed_dropout import use_sample_keys
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from multiprocess.test_exact import CASES as ALL_CASES
from multiprocess.test_exact import EMA, FLOAT32, MUON, PLATEAU

CASES = {name: case for name, case in ALL_CASES.items() if name != MUON}  # Muon needs entire weights
RELU = "bfloat16, fast_alexnet, SGD"
CASES[RELU] = ALL_CASES[MUON] | {"optim": {"name": "sgd", "lr": 0.05, "bias_lr_factor": 4.0}}
CASES["bfloat16, fast_alexnet, GELU, SGD"] = CASES[RELU] | {"model": {**CASES[RELU]["model"], "activation": "gelu"}}
FSDP, GATHERED_ONCE, DDP = {"name": "fsdp"}, {"name": "fsdp", "reshard_after_forward": False}, {"name": "ddp"}
SHARDED: dict[int, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    2: (2, FSDP, tuple(CASES)),
    3: (1, GATHERED_ONCE, (FLOAT32, PLATEAU, EMA, RELU)),
    4: (1, FSDP, (FLOAT32, PLATEAU)),
}
"""World size -> threads per rank, engine, cases."""
STOPPED = ((FSDP, 3), (DDP, 1), (FSDP, 4), (GATHERED_ONCE, 2), (DDP, 3), (FSDP, 2))
"""One run is resumed under each of these for two steps."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def config_of(name: str, run_dir: Path, engine: dict[str, Any], threads: int = 1) -> TrainConfig:
    return small_config(run_dir, threads=threads, exact={"shards": 8}, engine=engine, **CASES[name])


@in_group
def run_cases(folder: Path, names: tuple[str, ...], engine: dict[str, Any], threads: int) -> dict[str, Trace]:
    size = collectives.world_size()
    return {name: traced(config_of(name, folder / f"{name}, {size}", engine, threads)) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Trace]:
    (traces,) = run_ranks(run_cases, 1, folder, tuple(CASES), DDP, 1, timeout_seconds=200)
    return traces  # type: ignore[no-any-return]


@pytest.mark.parametrize("world_size", SHARDED)
def test_sharded_weights_are_bit_identical_to_replicated(
    alone: dict[str, Trace], folder: Path, world_size: int
) -> None:
    threads, engine, names = SHARDED[world_size]
    for rank in run_ranks(run_cases, world_size, folder, names, engine, threads, timeout_seconds=300):
        for name, trace in rank.items():
            assert "ReduceScatter" in trace.transports
            assert trace.steps == alone[name].steps, name
            assert trace.epochs == alone[name].epochs, name
            assert trace.decisions == alone[name].decisions, name
            assert trace.tensors == alone[name].tensors, name
    for name in names:
        assert_same_run(RunFolder(folder / f"{name}, {world_size}"), RunFolder(folder / f"{name}, 1"))


@in_group
def next_steps(run_dir: Path, name: str, engine: dict[str, Any], stop_after: int | None) -> Trace:
    return traced(config_of(name, run_dir, engine), stop_after)


def test_resuming_sharded_or_not_is_bit_identical(alone: dict[str, Trace], folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for attempt, (engine, world_size) in enumerate(STOPPED):
        stop_after = 1 if attempt < len(STOPPED) - 1 else None
        ranks = run_ranks(next_steps, world_size, run, PLATEAU, engine, stop_after, timeout_seconds=120)
    for trace in ranks:
        assert trace.tensors == alone[PLATEAU].tensors
    assert_same_run(RunFolder(run), RunFolder(folder / f"{PLATEAU}, 1"))


@in_group
def run_network(folder: Path, engine: dict[str, Any], name: str) -> Trace:
    size = collectives.world_size()
    return traced(
        small_config(folder / f"{size}", exact={"shards": 4}, engine=engine, model={"name": name}, global_batch_size=8)
    )


# Of layers that only some images use; of frozen weights with trained biases, whose gradient may be complete before the
# backward pass reads the weight.
@pytest.mark.parametrize("name", ["kit.experts:Experts", "kit.networks:BiasesOnly"])
def test_unusual_networks_are_bit_identical(tmp_path: Path, name: str) -> None:
    (expected,) = run_ranks(run_network, 1, tmp_path, DDP, name, timeout_seconds=200)
    for trace in run_ranks(run_network, 2, tmp_path, FSDP, name, timeout_seconds=200):
        assert trace.tensors == expected.tensors
    assert_same_run(RunFolder(tmp_path / "2"), RunFolder(tmp_path / "1"))


@in_group
def bytes_at_rest(engine: dict[str, Any], precision: str) -> dict[str, int]:
    """Return the bytes that this rank keeps between steps, and the maximum of gathered weights during a micro-step."""
    config = small_config(Path("unused"), exact={"shards": 8}, engine=engine, precision=precision)
    topology = Topology(collectives.rank(), collectives.world_size())
    device = choose_device("cpu", topology)
    data = build_data(config, topology, device)
    built: Any = build_engine(config, topology, data, device)
    copy, gathered = built.model, [0]

    def measure(*_: Any) -> None:
        gathered.append(sum(p.untyped_storage().nbytes() for p in copy.parameters()))

    def loss(model: Any, batch: Batch) -> tuple[Any, Any]:
        with use_sample_keys(batch.sample_keys):
            logits = model(batch.images)
        return logits.sum(), (logits.detach().sum(1), logits.detach())

    for layer in copy.modules():
        layer.register_forward_hook(measure)
    built.micro_step(loss, next(data.train_epoch(0))[0], last=True)
    built.step(0.01, step=0)
    tensors = built.weights.local_tensors()
    return {
        "full": sum(p.numel() * 4 for p in copy.parameters()),
        "gathered": sum(p.untyped_storage().nbytes() for p in (*copy.parameters(), *built._plain.parameters())),
        "maximum": max(gathered),
        "weights": sum(local.nbytes for name, (local, _) in tensors.items() if name.endswith((".weight", ".bias"))),
        "optimizer": sum(local.nbytes for name, (local, _) in tensors.items() if name.startswith("optimizer.")),
        "gradients": sum(bucket.reduce.total.nbytes for bucket in built._reducer._buckets),
        "unsent": sum(bucket.reduce._sums is not None for bucket in built._reducer._buckets),
    }


@in_group
def gathered_views() -> dict[str, list[float]]:
    """Shard and gather parameters that are views of one buffer, as the weights of cuDNN's LSTM are."""
    buffer, model = torch.arange(10.0), nn.Module()
    model.first, model.second = nn.Parameter(buffer[:4]), nn.Parameter(buffer[4:].view(2, 3))
    weights = ShardedWeights(model, layers={}, shards=2, low=None, reshard_after_forward=False)
    weights.gather_other_parameters()
    return {name: weights.gathered[id(p)].flatten().tolist() for name, p in model.named_parameters()}


def test_views_of_one_buffer_are_gathered_to_their_places() -> None:
    expected = {"first": [0.0, 1.0, 2.0, 3.0], "second": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]}
    assert run_ranks(gathered_views, 2) == [expected] * 2


@pytest.mark.parametrize(("world_size", "precision"), [(2, "bfloat16"), (4, "float32")])
def test_a_rank_keeps_only_its_shards(world_size: int, precision: str) -> None:
    for rank in run_ranks(bytes_at_rest, world_size, FSDP, precision, timeout_seconds=100):
        for kind in ("weights", "optimizer", "gradients"):
            assert rank[kind] == pytest.approx(rank["full"] / world_size, rel=0.03), kind
        assert (rank["gathered"], rank["unsent"]) == (0, 0)
        largest_layer = 1024 * 512 * (2 if precision == "bfloat16" else 4)
        assert largest_layer < rank["maximum"] < 1.2 * largest_layer < 0.8 * rank["full"]
