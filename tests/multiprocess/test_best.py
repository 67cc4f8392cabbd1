"""Several ranks restore the best epoch, which the budget did not allow to save."""

from pathlib import Path

import pytest
from kit.ranks import in_group, run_ranks
from unit.test_checkpoint import PlainEngine, three_epochs

from distributed.checkpoint.checkpointer import Checkpointer
from distributed.checkpoint.save_budget import SaveBudget
from distributed.comm import collectives
from distributed.run.claim import ClaimedRun


@in_group
def restore_the_best(folder: Path) -> list[float]:
    """Return the weights after epochs with weights 1, 2, 3. The second is the best, and only the first was saved."""
    run = ClaimedRun.claim(folder, world_size=2) if collectives.rank() == 0 else None
    writer = Checkpointer(folder / "checkpoints", run, keep_last=1, metadata={}, budget=SaveBudget(1e-9))
    state = three_epochs(writer)
    engine = PlainEngine(9)
    writer.restore_best(engine, state)  # type: ignore[arg-type]
    if run:
        run.release()
    return engine.model[0].weight.unique().tolist()


@pytest.mark.timeout(120)
def test_all_ranks_restore_an_unsaved_best_epoch(tmp_path):
    assert run_ranks(restore_the_best, 2, tmp_path / "run") == [[2.0], [2.0]]
