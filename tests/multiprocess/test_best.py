"""A return to the best epoch, whose save was not affordable, by several ranks."""

from pathlib import Path

import pytest
from ranks import in_group, run_ranks
from unit.test_checkpoint import PlainEngine

from distributed import collectives
from distributed.checkpoint import Checkpointer
from distributed.claimed_run import ClaimedRun
from distributed.save_budget import SaveBudget
from distributed.schedule import Constant
from distributed.state import Best, TrainState


@in_group
def return_to_the_best(folder: Path) -> list[float]:
    """The weights after epochs with weights 1, 2, 3, of which the second was the best and no epoch was saved but the first."""
    run = ClaimedRun.claim(folder, world_size=2) if collectives.rank() == 0 else None
    writer = Checkpointer(folder / "checkpoints", run, keep_last=1, facts={}, budget=SaveBudget(1e-9))
    for epoch in (1, 2, 3):
        state = TrainState(Constant(1.0), epoch=epoch, step=epoch, best=Best(1, 2, 0.5) if epoch > 1 else None)
        writer.save_epoch(PlainEngine(epoch), state, is_best=epoch == 2, ends=False)  # type: ignore[arg-type]
        writer.wait()
    engine = PlainEngine(9)
    writer.return_to_best(engine, state)  # type: ignore[arg-type]
    if run:
        run.release()
    return engine.model[0].weight.unique().tolist()


@pytest.mark.timeout(120)
def test_all_ranks_return_to_a_best_epoch_not_saved(tmp_path):
    assert run_ranks(return_to_the_best, 2, tmp_path / "run") == [[2.0], [2.0]]
