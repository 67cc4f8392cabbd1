"""`train --dry-run` as users type it: it changes no run folder, and refuses what `train` refuses."""

import re
from pathlib import Path

import pytest
from kit.abuse import assert_outcome, call, untouched
from kit.commands import Command, torchrun

pytestmark = pytest.mark.timeout(200)
SMALL = ("--data.name", "generated10", "--data.train_samples", 100, "--data.test_samples", 20, "--global_batch_size", 20,
         "--schedule.name", "constant", "--device", "cpu", "--threads", 1, "--epochs", 2)  # fmt: skip


def test_two_ranks_under_torchrun(tmp_path: Path) -> None:
    arguments = ("--dry-run", *SMALL, "--run_dir", tmp_path / "run", "--engine.name", "fsdp")
    with Command(torchrun(2, *arguments), output=tmp_path / "output") as command:
        assert command.wait() == 0, command.text
        assert command.text.count("measured peak") == 1
        assert "to finish" in command.text
        assert f"run folder    {tmp_path}/run: nothing was written" in command.text
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_saved_is_left_alone(tmp_path: Path) -> None:
    arguments = (*SMALL, "--run_dir", tmp_path / "run")
    done = call("train", *arguments)
    assert done.code == 0, done.err
    (tmp_path / "store").mkdir()
    with untouched(tmp_path):
        again = call("train", *arguments, "--dry-run", "--checkpoint.upload_to", (tmp_path / "store").as_uri())
        longer = call("train", *SMALL[:-1], 4, *arguments[-2:], "--dry_run")
    assert (again.code, longer.code) == (0, 0), longer.err
    assert "this run is finished" in again.err
    assert "8 steps, after the 8 that the run folder has" in longer.out


ABUSES = {
    "another experiment": (["--seed", 1], "seed = 1: this run was started with 0"),
    "more shards than images": (["--exact.shards", 64], "exact.shards = 64 is more than the 20 images"),
    "a value": (["--dry-run", "true"], "'true': not an option"),
    "with =": (
        ["--dry-run=true"],
        "unknown setting; a flag of python -m distributed.train, not a setting: give --dry-run there",
    ),
    "no weights": (["--init_from", "nowhere"], "init_from = nowhere: no checkpoint there"),
    "no network": (["--model.name", "nothing_zq:make"], "there is no module nothing_zq"),
}


@pytest.mark.parametrize("case", ABUSES)
def test_what_train_refuses_is_refused(case: str, tmp_path: Path) -> None:
    more, message = ABUSES[case]
    if case == "another experiment":
        assert call("train", *SMALL, "--run_dir", tmp_path / "run").code == 0
    with untouched(tmp_path):
        found = call("train", *SMALL, "--run_dir", tmp_path / "run", "--dry-run", *more)
    assert_outcome(found, message, lines=2 if case == "another experiment" else 1)


def test_a_config_file_cannot_request_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("dry_run = true\n")
    found = call("train", tmp_path / "c.toml", *SMALL, "--run_dir", tmp_path / "run")
    assert_outcome(found, "unknown setting; a flag of python -m distributed.train, not a setting")


DEEP = """\
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 1), nn.Tanh())))

    def forward(self, x):
        return x + self.layers(x)


def deep(num_classes):
    blocks = (Block() for _ in range(20))
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(*blocks), nn.Flatten(), nn.Linear(16384, num_classes))
"""


def test_gradient_checkpointing_lowers_the_peak(tmp_path: Path) -> None:
    """20 blocks of 6 tensors; 100 images of 16 x 32 x 32 take 6.25 MiB in each: 750 MiB, or 125 for the inputs of blocks."""
    (tmp_path / "net_zq.py").write_text(DEEP)
    arguments = ("--data.name", "generated10", "--data.train_samples", 200, "--data.test_samples", 20, "--threads", 1,
                 "--global_batch_size", 100, "--schedule.name", "constant", "--device", "cpu", "--precision", "float32",
                 "--exact.shards", 0, "--model.name", "net_zq:deep", "--run_dir", tmp_path / "run", "--dry-run")  # fmt: skip
    peaks = []
    for more in ((), ("--grad_checkpointing.enabled",)):
        # Under torchrun, whose OMP_NUM_THREADS = 1 keeps other threads' memory out of the peak.
        with Command(torchrun(1, *arguments, *more), output=tmp_path / f"output{len(more)}", cwd=tmp_path) as command:
            assert command.wait() == 0, command.text
            peaks.append(float(re.search(r"measured peak ([\d,]+) MiB", command.text)[1].replace(",", "")))
    plain, checkpointed = peaks
    assert plain - checkpointed > 300, peaks
