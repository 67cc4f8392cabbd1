"""A stop request to one rank stops all ranks at the same step, with everything saved."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit.ranks import in_group, run_ranks
from kit.small_runs import StopAfter, newest_checkpoint, small_config
from safetensors.torch import load_file

from distributed.comm import collectives
from distributed.recipe import train
from distributed.run.folder import RunFolder
from distributed.training.stop import NeverStop, StepAgreement

REQUEST_STEP = 4
SAVE_EVERY = 0.2


@in_group
def train_until_a_request(run_dir: Path, requested_rank: int) -> dict[str, Any]:
    rank = collectives.rank()
    result = train(small_config(run_dir), stop=StopAfter(REQUEST_STEP) if rank == requested_rank else None)
    position = (result.epoch, result.step)
    return {"reason": result.stop_reason, "state": result.state.state_dict(), "position": position}


@dataclass(frozen=True)
class Stopped:
    run: RunFolder
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    return Stopped(RunFolder(run_dir), run_ranks(train_until_a_request, 3, run_dir, 1))


@pytest.mark.timeout(120)
def test_all_ranks_stop_one_step_after_the_request(stopped: Stopped) -> None:
    assert [rank["position"] for rank in stopped.ranks] == [(0, REQUEST_STEP + 1)] * 3
    assert [rank["state"] for rank in stopped.ranks] == [stopped.ranks[0]["state"]] * 3


@pytest.mark.timeout(120)
def test_all_ranks_know_the_reason_of_the_requested_rank(stopped: Stopped) -> None:
    assert [rank["reason"] for rank in stopped.ranks] == ["the test"] * 3


@pytest.mark.timeout(120)
def test_the_step_of_the_stop_is_saved(stopped: Stopped) -> None:
    path = newest_checkpoint(stopped.run.path)
    assert path.name == f"step-{REQUEST_STEP + 1:08d}-epoch-000"
    assert json.loads((path / "state.json").read_text())["state"] == stopped.ranks[0]["state"]
    tensors = load_file(path / "tensors.safetensors")
    assert tensors["model.conv.1.num_batches_tracked"] == REQUEST_STEP + 1
    assert any(name.endswith("momentum_buffer") for name in tensors)


@pytest.mark.timeout(120)
def test_the_status_says_stopped_with_its_progress(stopped: Stopped) -> None:
    status = stopped.run.status()
    assert (status.status, status.exit_code, status.step) == ("stopped", 75, REQUEST_STEP + 1)


@pytest.mark.timeout(120)
def test_every_rank_has_a_log_file_and_rank_0_logs_the_plan(stopped: Stopped) -> None:
    logs = sorted(stopped.run.logs.glob("rank-*.log"))
    assert [log.name for log in logs] == [f"rank-{rank:04d}.log" for rank in range(3)]
    assert "batch 24 = 1 micro-batch of 24, 8 shards, 2 to 3 per rank; 3 ranks" in logs[0].read_text()


@in_group
def agree_on_steps() -> tuple[float, dict[str, list[tuple[bool, bool]]]]:
    """Return the duration of the second agreement in seconds, and both agreements' decisions at each step."""
    rank = collectives.rank()
    found = {}
    options: Any = {"is_main": rank == 0, "timeout_seconds": 30}
    agreement = StepAgreement(StopAfter(3) if rank == 2 else NeverStop(), save_every_seconds=0, **options)
    found["stop"] = [agreement.after_step() for _ in range(5)]
    start = time.monotonic()
    # Only rank 0's clock counts: by those of the other ranks every step would save.
    agreement = StepAgreement(NeverStop(), save_every_seconds=SAVE_EVERY if rank == 0 else 1e-9, **options)
    found["save"] = []
    for _ in range(12):
        time.sleep(0.05)
        found["save"].append(agreement.after_step())
    return time.monotonic() - start, found


@pytest.mark.timeout(120)
def test_stops_and_timed_saves_are_agreed_one_step_late() -> None:
    (seconds, *_), ranks = zip(*run_ranks(agree_on_steps, 3), strict=True)
    assert list(ranks) == [ranks[0]] * 3
    assert [stop for stop, _ in ranks[0]["stop"]] == [False, False, False, True, True]
    saves = [save for _, save in ranks[0]["save"]]
    assert 1 <= sum(saves) <= seconds / SAVE_EVERY
    assert not any(stop for stop, _ in ranks[0]["save"])
