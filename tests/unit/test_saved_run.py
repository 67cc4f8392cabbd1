import json
from pathlib import Path

import pytest

from distributed.config import TrainConfig, as_toml
from distributed.errors import InputError
from distributed.inference.saved_run import (
    check_complete,
    choose_checkpoint,
    for_device,
    read_config,
    read_content,
    with_data_root,
)
from distributed.process.output_file import check_writable


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("step-00000010-epoch-001", "step-00000020-epoch-002", "half"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "half":
            (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "latest").symlink_to("step-00000020-epoch-002")
    (tmp_path / "config.toml").write_text(as_toml(TrainConfig(run_dir=tmp_path, epochs=7)))
    return tmp_path


def test_the_config_is_read_from_the_run_folder(run: Path) -> None:
    assert read_config(run).epochs == 7


def test_a_folder_without_a_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing: no config.toml there; RUN is the folder that a training run wrote"):
        read_config(tmp_path / "nothing")


def test_auto_is_best_if_it_exists_otherwise_latest(run: Path) -> None:
    assert choose_checkpoint(run, "auto").name == "step-00000020-epoch-002"
    (run / "checkpoints" / "best").symlink_to("step-00000010-epoch-001")
    assert choose_checkpoint(run, "auto").name == "step-00000010-epoch-001"
    assert choose_checkpoint(run, "latest").name == "step-00000020-epoch-002"


def test_a_missing_checkpoint_lists_the_existing_ones(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        choose_checkpoint(run, "half")
    assert str(error.value) == (
        f"--checkpoint half: not in {run}/checkpoints; choose one of: "
        "latest, step-00000010-epoch-001, step-00000020-epoch-002"
    )
    with pytest.raises(InputError, match="choose one of: none yet"):
        choose_checkpoint(tmp_path / "other", "auto")


VALID = {"classes": ["cat"], "image_size": [32, 48], "normalization": {"mean": [0.5], "deviation": [1]}}


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"classes": [1]},
        {"image_size": 32},
        {"image_size": [32]},
        {"image_size": [32, 0]},
        {"normalization": None},
        {"normalization": {"mean": [0.5]}},
        {"normalization": {"mean": ["half"], "deviation": [1]}},
    ],
    ids=str,
)
def test_state_without_what_a_prediction_needs_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "state.json").write_text(json.dumps(VALID))
    assert read_content(tmp_path) == VALID
    (tmp_path / "state.json").write_text(json.dumps(VALID | change))
    with pytest.raises(InputError, match=r"state\.json: classes, normalization or image_size from another version"):
        read_content(tmp_path)


def test_a_deleted_checkpoint_is_not_called_damaged(tmp_path: Path) -> None:
    """A run that is still training deletes its older checkpoints."""
    for read in (check_complete, read_content):
        with pytest.raises(
            InputError, match="gone: deleted by a run that is still training; try again, or name another"
        ):
            read(tmp_path / "gone")
    with pytest.raises(InputError, match="damaged: "):
        check_complete(tmp_path)


def test_the_data_may_have_moved() -> None:
    assert with_data_root(TrainConfig(), Path("elsewhere")).data.root == Path("elsewhere")
    cached = TrainConfig.model_validate({"data": {"name": "image_folder", "cache": "/scratch"}})
    assert with_data_root(cached, Path("elsewhere")).data.cache is None
    generated = TrainConfig.model_validate({"data": {"name": "generated10"}})
    assert with_data_root(generated, None) == generated
    with pytest.raises(
        InputError, match=r"--data\.root elsewhere: this run used data\.name = generated10; leave it out"
    ):
        with_data_root(generated, Path("elsewhere"))


def test_output_files_are_checked_before_the_work(tmp_path: Path) -> None:
    check_writable("--out", tmp_path / "new" / "file.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file/report.html: (Not a directory|File exists); name a file that"):
        check_writable("--out", tmp_path / "file" / "report.html")
    with pytest.raises(InputError, match="is a folder"):
        check_writable("--out", tmp_path)


@pytest.mark.parametrize(("shards", "expected"), [(0, 0), (8, "auto")])
def test_a_run_in_fast_mode_is_evaluated_in_fast_mode(shards: int, expected: int | str) -> None:
    """`exact.shards = auto` means 8 on a CPU, also for a run that was trained on a GPU."""
    config = TrainConfig.model_validate({"device": "cuda"})
    assert for_device(config, "cpu", {"bits": {"shards": shards}}).exact.shards == expected
    assert for_device(config, "cpu", None).exact.shards == "auto"


def test_evaluations_do_not_compile() -> None:
    """It takes minutes and a compiler; a compiled run trains in fast mode."""
    found = for_device(TrainConfig(compile=True, device="cuda"), "cpu", None)
    assert (found.compile, found.exact.shards, found.cuda_graphs) == (False, 0, False)
