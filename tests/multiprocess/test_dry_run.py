"""A dry run on several ranks, under all engines: sizes of this rank's tensors, times, and nothing on disk."""

import contextlib
import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config

from distributed.comm import collectives
from distributed.dry_run import dry_run

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": {"name": "ddp"}, "exact": {"shards": 0}},
    "ddp, exact": {"engine": {"name": "ddp"}, "exact": {"shards": 4}},
    "fsdp": {"engine": {"name": "fsdp"}, "exact": {"shards": 0}},
    "fsdp, exact": {"engine": {"name": "fsdp"}, "exact": {"shards": 4}},
    **{f"stage {stage}": {"engine": {"name": "deepspeed", "zero_stage": stage}} for stage in (0, 1, 2, 3)},
}
FEW: dict[str, Any] = {"global_batch_size": 8, "data": {"train_samples": 20}}
PARAMETERS = 907_210
MIB = PARAMETERS * 4 / 2**20


@in_group
def printed(run_dir: Path, engines: list[str]) -> dict[str, str]:
    found = {}
    for engine in engines:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            dry_run(small_config(run_dir, **FEW, **ENGINES[engine], optim={"ema_decay": 0.9}))
        found[engine] = text.getvalue()
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank prints, by engine."""
    folder = tmp_path_factory.mktemp("dry")
    names = [name for name in ENGINES if not name.startswith("stage") or find_spec("deepspeed")]
    found = run_ranks(printed, 2, folder / "run", names, timeout_seconds=400)
    assert list(folder.iterdir()) == []
    return found


def sizes(text: str) -> dict[str, float]:
    return {kind: float(size) for size, kind in re.findall(r"([\d.]+) MiB of ([a-zA-Z ]+)", text)}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_can_be_tried(engine: str, texts: list[dict[str, str]]) -> None:
    if engine.startswith("stage"):
        pytest.importorskip("deepspeed")
    text, other = (rank[engine] for rank in texts)
    assert other == ""
    assert f"parameters    {PARAMETERS:,}\n" in text
    sharded = {"fsdp": 4, "fsdp, exact": 4, "stage 1": 1, "stage 2": 2, "stage 3": 4}.get(engine, 0)
    expected = {
        "parameters and buffers": MIB / (2 if sharded == 4 else 1),
        "gradients": MIB / (2 if sharded >= 2 else 1),
        "optimizer state": MIB / (2 if sharded >= 1 else 1),
        "EMA": MIB / (2 if sharded == 4 else 1),
    }
    assert sizes(text) == pytest.approx(expected, abs=0.1)
    assert len(re.findall(r"timed steps   (\S+ ){5}seconds, [\d,]+ images/s\n", text)) == 1
    assert re.search(r"to finish     [\d.]+ (seconds|minutes): 6 steps; evaluation", text)


@in_group
def ranks_in_step(run_dir: Path) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        dry_run(small_config(run_dir, **FEW, exact={"shards": 4}))
    return collectives.world_size()


def test_three_ranks_in_exact_mode(tmp_path: Path) -> None:
    assert run_ranks(ranks_in_step, 3, tmp_path / "run", timeout_seconds=180) == [3] * 3
    assert not (tmp_path / "run").exists()
