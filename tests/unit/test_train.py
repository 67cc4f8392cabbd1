import errno
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


def test_without_config_and_cifar_images_are_generated(capsys):
    config, finished = checked_config([], Topology())
    assert config.data.name == "generated10"
    assert config.run_dir == Path("runs/improved_alexnet-generated10")
    assert not finished
    assert "NOT ON CIFAR-10" in capsys.readouterr().err


def test_only_rank_0_shows_the_banner(capsys):
    assert checked_config([], Topology(rank=1, world_size=2))[0].data.name == "generated10"
    assert capsys.readouterr().err == ""


def test_settings_of_other_sections_do_not_name_the_data():
    assert checked_config(["--epochs", "3"], Topology(rank=1, world_size=2))[0].data.name == "generated10"


@pytest.mark.parametrize("arguments", [["--data.name", "cifar10"], ["--data.root", "elsewhere"], ["some.toml"]])
def test_named_data_must_exist(arguments):
    Path("some.toml").write_text("epochs = 3\n")
    with pytest.raises(InputError, match=r"--data\.root") as caught:
        checked_config(arguments, Topology())
    assert "No such file" in caught.value.lines[0]


def test_damaged_cifar_is_not_replaced_by_generated_images():
    Path("data/cifar-10-batches-bin").mkdir(parents=True)
    with pytest.raises(InputError, match=r"data_batch_1\.bin"):
        checked_config([], Topology())


def test_local_rank_0_prints_the_error(capsys):
    assert refuse(InputError("one", "two"), Topology()) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: one\nerror: two\n"


def test_a_wrong_config_exits_with_2_and_no_traceback():
    result = subprocess.run(
        [sys.executable, "-m", "distributed.train", "--device", "cpu", "--epochs", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "error: command line: epochs = 0: should be greater than 0\n"


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        (["--exact.shards", "2"], 3),
        (["--exact.shards", "2", "--device", "cuda"], 3),
        (["--global_batch_size", "7", "--device", "cpu"], 5),
        (["--device", "cpu"], 9),
    ],
)
def test_too_many_processes_fail_before_importing_torch(arguments, processes):
    enough = checked_config(arguments, Topology(world_size=processes // 2))[0]
    assert enough.data.name == "generated10"
    for rank in (0, processes - 1):
        with pytest.raises(InputError, match=rf"is less than the {processes} processes"):
            checked_config(arguments, Topology(rank=rank, world_size=processes))


@pytest.mark.parametrize(
    "arguments", [[], ["--exact.shards", "0"], ["--device", "cuda"], ["--exact.shards", "16", "--device", "cpu"]]
)
def test_world_sizes_that_may_work_are_not_refused(arguments):
    assert checked_config(arguments, Topology(world_size=9))[0].data.name == "generated10"


# Data


def lay_out(*paths: str) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"\x1f\x8b")


@pytest.mark.parametrize("archive", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
def test_an_archive_in_the_data_folder_is_used(archive, capsys):
    lay_out(f"data/{archive}")
    assert checked_config([], Topology())[0].data.name == "cifar10"
    assert capsys.readouterr().err == ""


def test_an_image_folder_is_checked_before_importing_torch():
    lay_out("data/train/ant/1.png", "data/train/cow/1.png", "data/test/ant/1.png")
    assert checked_config(["--data.name", "image_folder"], Topology())[0].data.name == "image_folder"
    lay_out("data/test/bee/1.png")
    with pytest.raises(InputError, match="no folder in"):
        checked_config(["--data.name", "image_folder"], Topology())


def test_a_download_starts_after_all_other_checks():
    download = ["--data.download", "--data.urls", '["http://127.0.0.1:9/cifar-10-binary.tar.gz"]']
    with pytest.raises(InputError, match="is less than the 9 processes"):
        checked_config([*download, "--device", "cpu"], Topology(world_size=9))
    assert not Path("data").exists()


def test_a_failed_download_is_one_line_before_importing_torch(tmp_path):
    archive = "cifar-10-binary.tar.gz"
    arguments = ["--data.download", "--data.urls", f'["http://127.0.0.1:9/{archive}"]', "--data.root", str(tmp_path)]
    code = (
        "import sys, distributed.data.sources.download as fetch\n"
        "fetch.time.sleep = lambda _: None\n"
        "from distributed import train\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "code = train.main()\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    refused, remedy = result.stderr.splitlines()
    assert refused == f"error: download of {archive}: http://127.0.0.1:9/{archive}: [Errno 111] Connection refused"
    assert remedy.startswith(f"error: download of {archive}: go online")


def test_a_lost_mount_is_one_line(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)

    def lost(self: Path) -> bool:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(self))

    monkeypatch.setattr(Path, "is_dir", lost)
    with pytest.raises(InputError, match=r"run.*: Transport endpoint is not connected; give another path, or restore"):
        checked_config(["--data.name", "generated10", "--run_dir", str(run)], Topology())


@pytest.mark.parametrize("setting", ["data.root", "run_dir", "init_from"])
def test_a_folder_that_may_not_be_entered_is_one_line(setting, closed):
    with pytest.raises(InputError, match=r"Permission denied; give another path, or restore access to it"):
        checked_config([f"--{setting}", str(closed / "x")], Topology())
