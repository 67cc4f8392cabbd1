"""Exact mode on torchvision's networks and an LSTM: bit-identical at any world size, and equal to fast mode in float64."""

from pathlib import Path
from typing import Any

import pytest
from kit.backward_memory import compared
from kit.networks import CASES, CLIP, EVEN, NETWORKS, UNEVEN, Outcome, fast_deviation, network_config, run_epoch
from kit.precision import LOW
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST
from kit.traces import Trace, assert_same_run, traced

from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.run.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
DDP, FSDP = {"name": "ddp"}, {"name": "fsdp"}
OTHERS = [name for name in NETWORKS if name not in ("resnet18", "resnet50")]
PRECISIONS = sorted({"float32", LOW})
STOPPED: dict[int, dict[str, Any]] = {3: DDP, 1: DDP, 4: FSDP, 2: FSDP}
"""World size -> engine under which a run of resnet18 continues; in this order."""
ENGINES = {1: (DDP,), 2: (DDP, FSDP), 3: (DDP,), 4: (FSDP,)}
"""World size -> engines that run every case."""
Resnet18 = dict[int, list[tuple[dict[tuple[str, str, str], Outcome], Trace]]]
"""By world size and rank: outcomes by (engine, precision, case), and this rank's part of the stopped run."""


def epoch_of(network: str, case: str, **settings: Any) -> Outcome:
    return run_epoch(network_config(network, Path("unused"), case=case, **settings))


@in_group
def run_resnet18(folder: Path) -> tuple[dict[tuple[str, str, str], Outcome], Trace]:
    """Run every case with every precision and engine, then continue the stopped run."""
    world_size, outcomes = collectives.world_size(), {}
    for engine in ENGINES[world_size]:
        for precision in PRECISIONS:
            for case in CASES:
                outcomes[engine["name"], precision, case] = epoch_of(
                    "resnet18", case, precision=precision, engine=engine
                )
    last = world_size == list(STOPPED)[-1]
    stopped = traced(stopped_config(folder / "stopped", STOPPED[world_size]), None if last else 1)
    if world_size == 1:
        traced(stopped_config(folder / "undisturbed", DDP))
    return outcomes, stopped


def stopped_config(run_dir: Path, engine: dict[str, Any]) -> TrainConfig:
    return network_config("resnet18", run_dir, case=UNEVEN, precision=LOW, engine=engine, epochs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def resnet18(folder: Path) -> Resnet18:
    return {world_size: run_ranks(run_resnet18, world_size, folder, timeout_seconds=150) for world_size in STOPPED}


@pytest.mark.parametrize("world_size", sorted(set(STOPPED) - {1}))
def test_resnet18_is_bit_identical(resnet18: Resnet18, world_size: int) -> None:
    ((alone, _),) = resnet18[1]
    for outcomes, _ in resnet18[world_size]:
        assert len(outcomes) == len(ENGINES[world_size]) * len(alone)
        assert len(alone) == 2 * len(PRECISIONS)
        for (engine, precision, case), outcome in outcomes.items():
            assert outcome == alone["ddp", precision, case], (engine, precision, case)


def test_the_cases_exercise_their_features(resnet18: Resnet18) -> None:
    ((alone, _),) = resnet18[1]
    for outcome in alone.values():
        assert len(set(outcome.norms)) == 3
        assert min(outcome.norms) > CLIP
        assert outcome.test.first_bad_step is None
    assert [totals.count for totals in alone["ddp", "float32", EVEN].train] == [8, 8, 8]
    assert [totals.count for totals in alone["ddp", "float32", UNEVEN].train] == [11, 11, 5]


def test_resnet18_resumed_at_other_world_sizes(resnet18: Resnet18, folder: Path) -> None:
    stops = [resnet18[world_size][0][1].stopped for world_size in STOPPED]
    assert stops == [True, True, True, False]
    assert_same_run(RunFolder(folder / "stopped"), RunFolder(folder / "undisturbed"))


@in_group
def run_others() -> dict[str, Outcome]:
    return {name: epoch_of(name, EVEN, precision=LOW) for name in OTHERS}


def test_other_networks_are_bit_identical() -> None:
    (alone,) = run_ranks(run_others, 1, timeout_seconds=150)
    for rank in run_ranks(run_others, 3, timeout_seconds=150):
        for name in OTHERS:
            assert len(set(alone[name].norms)) == 3
            assert rank[name] == alone[name], name


@in_group
def deviations(names: list[str]) -> dict[str, float]:
    return {name: fast_deviation(name) for name in names}


@pytest.mark.parametrize(("world_size", "names"), [(1, [*OTHERS, "resnet18"]), (2, ["resnet18"])])
def test_fast_mode_in_float64_agrees(world_size: int, names: list[str]) -> None:
    for rank in run_ranks(deviations, world_size, names, timeout_seconds=150):
        print(rank)
        for name in names:
            assert rank[name] <= 1e-12, name


@in_group
def fast_epoch() -> Outcome:
    return epoch_of("resnet18", EVEN, exact=FAST)


def test_fast_mode_differs_from_exact_mode(resnet18: Resnet18) -> None:
    """Negative control: an outcome of other roundings is another outcome."""
    ((exact, _),) = resnet18[1]
    for outcome in run_ranks(fast_epoch, 2):
        expected = exact["ddp", "float32", EVEN]
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-2)
        assert outcome.norms != expected.norms
        assert outcome.tensors != expected.tensors


def test_the_backward_pass_needs_little_more_memory() -> None:
    """Beyond what the process had before its forward pass, at most 1.1 of what torch's engine needs."""
    peaks = compared("resnet18")
    print(peaks)
    added = {how: peak.backward - peak.before for how, peak in peaks.items()}
    assert added["engine"] > 200
    assert added["pass"] <= 1.1 * added["engine"]
