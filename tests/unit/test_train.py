import subprocess
import sys
from pathlib import Path

import pytest

from distributed.errors import ExitCode, InputError
from distributed.topology import Topology
from distributed.train import checked_config, refuse


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_config_and_cifar_the_run_is_on_generated_images_under_a_banner(capsys):
    config, finished = checked_config([], Topology())
    assert config.data.name == "generated10"
    assert config.run_dir == Path("runs/improved_alexnet-generated10")
    assert not finished
    assert "NOT ON CIFAR-10" in capsys.readouterr().err


def test_only_the_rank_that_speaks_shows_the_banner(capsys):
    assert checked_config([], Topology(rank=1, world_size=2))[0].data.name == "generated10"
    assert capsys.readouterr().err == ""


def test_other_settings_do_not_name_the_data():
    assert checked_config(["--epochs", "3"], Topology(rank=1, world_size=2))[0].data.name == "generated10"


@pytest.mark.parametrize("words", [["--data.name", "cifar10"], ["--data.root", "elsewhere"], ["some.toml"]])
def test_data_that_was_named_must_be_there(words):
    Path("some.toml").write_text("epochs = 3\n")
    with pytest.raises(InputError, match=r"--data\.root") as caught:
        checked_config(words, Topology())
    assert "No such file" in caught.value.lines[0]


def test_a_folder_of_cifar_that_is_damaged_is_no_reason_to_train_on_generated_images():
    Path("data/cifar-10-batches-bin").mkdir(parents=True)
    with pytest.raises(InputError, match=r"data_batch_1\.bin"):
        checked_config([], Topology())


def test_local_rank_0_says_what_is_wrong(capsys):
    assert refuse(InputError("one", "two"), Topology()) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: one\nerror: two\n"


def test_a_wrong_config_ends_with_exit_code_2_and_no_traceback():
    said = subprocess.run(
        [sys.executable, "-m", "distributed.train", "--epochs", "0"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    assert said.stderr == "error: command line: epochs = 0: should be greater than 0\n"


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        (["--exact.shards", "2"], 3),
        (["--exact.shards", "2", "--device", "cuda"], 3),
        (["--global_batch_size", "7", "--device", "cpu"], 5),
        (["--device", "cpu"], 9),
    ],
)
def test_more_processes_than_shards_are_refused_before_torch_comes_in_where_the_config_alone_says_so(words, processes):
    enough = checked_config(words, Topology(world_size=processes // 2))[0]
    assert enough.data.name == "generated10"
    for rank in (0, processes - 1):
        with pytest.raises(InputError, match=rf"is less than the {processes} processes"):
            checked_config(words, Topology(rank=rank, world_size=processes))


@pytest.mark.parametrize(
    "words", [[], ["--exact.shards", "0"], ["--device", "cuda"], ["--exact.shards", "16", "--device", "cpu"]]
)
def test_where_the_device_is_not_known_or_there_are_shards_enough_or_none_nothing_is_refused(words):
    assert checked_config(words, Topology(world_size=9))[0].data.name == "generated10"
