"""Options of `launch.slurm` that are passed on to sbatch."""

import pytest

from distributed.errors import InputError
from launch.slurm.__main__ import check_sbatch_options, parser, sbatch_command


@pytest.mark.parametrize(
    "option", ["--gres=gpu:4", "--gres=scratch:9,gpu:a100:4", "--gpus=8", "-G8", "--gpus-per-task=1"]
)
def test_gpus_that_would_not_be_checked_are_refused(option: str) -> None:
    with pytest.raises(InputError, match="it would not be checked; give --gpus-per-node N"):
        check_sbatch_options([option])


def test_other_resources_are_passed_on() -> None:
    check_sbatch_options(["--gres=scratch:100"])


@pytest.mark.parametrize("gpus", ["4", "a100:4"])
def test_gpus_may_have_a_type(gpus: str) -> None:
    command = sbatch_command(parser().parse_args(["--gpus-per-node", gpus]), ["config.toml"])
    assert f"--gpus-per-node={gpus}" in command
    assert not any("MAX_REQUEUES" in word for word in command), "the variable of that name counts"


@pytest.mark.parametrize("gpus", ["a100", "a100:", "0", "-1"])
def test_gpus_need_a_number(gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--gpus-per-node={gpus}"])
    assert "should be a whole number of at least 1" in capsys.readouterr().err
