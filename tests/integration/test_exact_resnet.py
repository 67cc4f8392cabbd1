"""resnet18 in exact mode, as users start it: killed on 2 processes, continued on 3 and on 1, with the bits of a quiet run."""

from pathlib import Path

import pytest
from kit.commands import Command, assert_same_bits, attempts, kill, status, torchrun
from kit.precision import LOW

from integration.test_elastic import compare

SETTINGS = (
    "configs/debug.toml", "--model.name", "torchvision.models:resnet18", "--exact.shards", 4, "--precision", LOW,
    "--global_batch_size", 16, "--data.train_samples", 128, "--data.test_samples", 20, "--epochs", 2,
    "--optim.lr", 0.02, "--optim.max_grad_norm", 1, "--checkpoint.every_steps", 3, "--logging.every_steps", 1,
    "--threads", 1, "--device", "cpu",
)  # fmt: skip


def finish(ranks: int, run: Path) -> None:
    with Command(torchrun(ranks, *SETTINGS, "--run_dir", run), output=run.with_suffix(".out")) as command:
        assert command.wait() == 0, command.text[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resnet18_killed_on_2_resumed_on_3_and_1(tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    for ranks, saved in ((2, 3), (3, 9)):
        with Command(torchrun(ranks, *SETTINGS, "--run_dir", run), output=tmp_path / "output") as command:
            command.wait_for(lambda: has_saved(run, saved), what=f"a checkpoint of step {saved}")  # noqa: B023
            kill(command.ranks()[-1])
            assert command.wait() != 0, command.text[-3000:]
            assert status(run)["status"] != "finished", "it ended before it was killed: make the run longer"
    finish(1, run)
    finish(1, undisturbed)
    started = attempts(run, "started")
    assert [attempt["world_size"] for attempt in started] == [2, 3, 1]
    assert started[0]["step"] < started[1]["step"] < started[2]["step"]
    assert_same_bits(run, undisturbed)
    code, output = compare(run, undisturbed)
    assert (code, output.startswith("bit-identical: ")) == (0, True), output


def has_saved(run: Path, step: int) -> bool:
    return (run / "status.json").exists() and status(run)["saved_step"] >= step
