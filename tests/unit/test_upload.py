"""Uploads to file:// URLs; over HTTP: tests/integration/test_object_store.py."""

import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit.speed import slowness
from loguru import logger

from distributed.checkpoint import download, object_store, upload
from distributed.checkpoint.download import download_newest, saved_content, store_has_run
from distributed.checkpoint.object_store import Store, StoreError
from distributed.checkpoint.resume_point import find_resume_point
from distributed.checkpoint.snapshot import write_checkpoint
from distributed.checkpoint.upload import Uploader, log_upload_result, upload_remaining
from distributed.config import TrainConfig, from_command_line
from distributed.errors import InputError
from distributed.run.checkpoint_layout import checkpoints, damage_of, name_of
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.train import checked_config
from distributed.training.precision import with_precision

ALL_FILES = {"manifest.json", "state.json", "tensors.safetensors"}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ClaimedRun]:
    claimed = ClaimedRun.claim(tmp_path / "run", world_size=1)
    yield claimed
    claimed.release()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store/run"


@pytest.fixture
def log() -> Iterator[list[str]]:
    messages: list[str] = []
    handle = logger.add(lambda message: messages.append(str(message)), format="{level} {message}")
    yield messages
    logger.remove(handle)


def config_of(run_dir: Path, url: str, *arguments: str) -> TrainConfig:
    common = ["--run_dir", str(run_dir), "--checkpoint.upload_to", url, "--data.name", "generated10"]
    return from_command_line([*common, *arguments]).config


def save(run: RunFolder, step: int, *, best: int | None = None, config: TrainConfig | None = None) -> str:
    """Save a checkpoint whose only tensor is the step."""
    totals = {"loss": 0, "correct": 0, "correct5": 0, "count": 0}
    content = {
        "state": {
            "step": step,
            "epoch": 1,
            "step_in_epoch": 0,
            "samples_seen": step,
            "window": totals,
            "epoch_totals": totals,
            "best": None if best is None else {"epoch": 0, "step": best, "value": 0.5},
            "schedule": {},
            "early_stopping": None,
        },
        "config": json.loads(config.model_dump_json()) if config else {},
        "bits": {},
    }
    name = name_of(step=step, epoch=1)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_checkpoint(run.checkpoints / f".writing-{name}", {"step": torch.tensor(step)}, content)
    (run.checkpoints / f".writing-{name}").rename(run.checkpoints / name)
    return name


def upload_all(uploader: Uploader) -> Uploader:
    uploader.start()
    uploader.set_deadline(20)
    while uploader.wait_a_second():
        pass
    return uploader


def has_run(config: TrainConfig) -> bool:
    return store_has_run(config, RunFolder(config.run_dir).newest_saved())


def in_store(url: str) -> dict[int, set[str]]:
    """The names of the files of each checkpoint in the store, by step."""
    root = Path(url.removeprefix("file://"))
    return {int(path.name[5:13]): {file.name for file in path.iterdir()} for path in sorted(root.glob("step-*"))}


def downloaded(run: ClaimedRun, url: str) -> str | None:
    return download_newest(Store(url), run, run.commit)


# Uploading


def test_the_store_has_what_the_run_folder_has(run, url):
    name = save(run, 1)
    upload_all(Uploader(url, run, keep_last=2))
    assert in_store(url) == {1: ALL_FILES}
    assert damage_of(Path(url.removeprefix("file://")) / name) is None
    assert json.loads(run.upload_file.read_text())["newest"] == name


def test_the_best_is_uploaded_before_the_newest(run, url, monkeypatch):
    """A resume from the newest checkpoint may have to restore the best one."""
    best = save(run, 1)
    names = [save(run, step, best=1) for step in (2, 3)]
    uploaded = []
    upload = Store.upload
    monkeypatch.setattr(Store, "upload", lambda store, path: (uploaded.append(path.name), upload(store, path)))
    upload_all(Uploader(url, run, keep_last=2))
    assert uploaded == [best, *names[::-1]]


def test_the_manifest_is_uploaded_last_and_removed_first(run, url, monkeypatch):
    done: list[str] = []
    uploader = Uploader(url, run, keep_last=1)
    fs = uploader.store._fs
    for verb in ("put_file", "rm_file"):
        before = getattr(fs, verb)
        monkeypatch.setattr(
            fs,
            verb,
            lambda *paths, verb=verb, before=before: (done.append(f"{verb} {paths[-1][-20:]}"), before(*paths)),
        )
    save(run, 1)
    upload_all(uploader)
    assert [one.rpartition("/")[2].split("-")[-1] for one in done if one.startswith("put_file")][-1] == "manifest.json"
    done.clear()
    save(run, 2)
    shutil.rmtree(checkpoints(run.checkpoints)[0])
    upload_all(uploader)
    assert in_store(url) == {2: ALL_FILES}
    removed = [one for one in done if one.startswith("rm_file")]
    assert [one.rpartition("/")[2] for one in removed][-3] == "manifest.json"


def test_the_store_keeps_what_the_run_folder_keeps(run, url):
    uploader = Uploader(url, run, keep_last=2)
    for step in (1, 2, 3, 4):
        save(run, step, best=1)
        upload_all(uploader)
    assert list(in_store(url)) == [1, 3, 4]


def test_an_empty_run_folder_loses_nothing_in_the_store(run, url):
    for step in (1, 2):
        save(run, step)
    upload_all(Uploader(url, run, keep_last=9))
    for path in checkpoints(run.checkpoints):
        shutil.rmtree(path)
    upload_all(Uploader(url, run, keep_last=9))
    save(run, 3)
    upload_all(Uploader(url, run, keep_last=9))
    assert list(in_store(url)) == [1, 2, 3]


def test_an_interrupted_upload_is_completed_or_removed(run, url):
    name = save(run, 7)
    root = Path(url.removeprefix("file://"))
    for left in (name, name_of(step=3, epoch=1)):
        (root / left).mkdir(parents=True)
        (root / left / "tensors.safetensors").write_bytes(b"half")
    upload_all(Uploader(url, run, keep_last=2))
    assert in_store(url) == {7: ALL_FILES}
    assert damage_of(root / name) is None


def test_different_or_truncated_files_are_replaced(run, url):
    name = save(run, 1)
    upload_all(Uploader(url, run, keep_last=2))
    there = Path(url.removeprefix("file://")) / name
    (there / "tensors.safetensors").write_bytes(b"cut")
    upload_all(Uploader(url, run, keep_last=2))
    assert damage_of(there) is None
    shutil.rmtree(run.checkpoints / name)
    save(run, 1, best=1)
    upload_all(Uploader(url, run, keep_last=2))
    assert (there / "manifest.json").read_bytes() == (run.checkpoints / name / "manifest.json").read_bytes()
    assert damage_of(there) is None


def test_a_failed_upload_is_retried_by_the_next_save(run, url, log, monkeypatch):
    uploader = Uploader(url, run, keep_last=2)
    fs, put = uploader.store._fs, uploader.store._fs.put_file

    def away(*_: object) -> None:
        raise ConnectionError("Could not connect")

    monkeypatch.setattr(fs, "put_file", away)
    save(run, 1)
    upload_all(uploader)
    assert "WARNING" in log[0]
    assert "Could not connect" in log[0]
    assert "the next save tries again" in log[0]
    assert "Could not connect" in json.loads(run.upload_file.read_text())["problem"]
    assert all("manifest.json" not in files for files in in_store(url).values())
    monkeypatch.setattr(fs, "put_file", put)
    save(run, 2)
    upload_all(uploader)
    assert in_store(url) == {1: ALL_FILES, 2: ALL_FILES}
    assert uploader.problem == ""


def test_uploads_go_on_after_the_file_system_was_away(run, url, monkeypatch):
    def away(_: Path) -> list[Path]:
        raise OSError(errno.ESTALE, "Stale file handle", str(run.checkpoints))

    uploader = Uploader(url, run, keep_last=2)
    save(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr("distributed.checkpoint.upload.checkpoints", away)
        upload_all(uploader)
    assert "Stale file handle" in uploader.problem
    upload_all(uploader)
    assert in_store(url) == {1: ALL_FILES}


def test_a_failed_removal_in_the_store_is_a_warning(run, url, log, monkeypatch):
    uploader = Uploader(url, run, keep_last=1)
    save(run, 1)
    upload_all(uploader)

    def kept(*_: object) -> None:
        raise StoreError("no right to delete")

    remove = Store.remove
    monkeypatch.setattr(Store, "remove", kept)
    newest = save(run, 2)
    shutil.rmtree(checkpoints(run.checkpoints)[0])
    upload_all(uploader)
    assert uploader.problem == ""
    assert json.loads(run.upload_file.read_text())["newest"] == newest
    assert [line for line in log if "WARNING" in line] == [
        "WARNING an old checkpoint was not deleted: no right to delete; the next save tries again\n"
    ]
    monkeypatch.setattr(Store, "remove", remove)
    upload_all(uploader)
    assert list(in_store(url)) == [2]


def test_a_superseded_attempt_uploads_nothing(run, url):
    uploader = Uploader(url, run, keep_last=1)
    save(run, 1)
    (run.path / "attempt.json").write_text('{"token": "another", "pid": 7, "host": "there"}')
    upload_all(uploader)
    assert "taken over by process 7 on there" in uploader.problem
    assert in_store(url) == {}
    assert not run.upload_file.exists()


def test_names_in_a_store_are_sorted_by_step(url):
    root = Path(url.removeprefix("file://"))
    for step in (99_999_999, 100_000_000, 7):
        (root / name_of(step=step, epoch=1)).mkdir(parents=True)
    (root / "step-000000009-epoch-001").mkdir()
    assert [int(name.split("-")[1]) for name in Store(url).names()] == [7, 99_999_999, 100_000_000]


def test_a_run_in_use_is_not_uploaded_by_another_process(run, url, log, monkeypatch):
    monkeypatch.setattr("distributed.run.claim.LOCK_WAIT_SECONDS", 0.05)
    save(run, 1)
    upload_remaining(config_of(run.path, url))
    assert in_store(url) == {}
    assert any("another run is writing there" in line for line in log)


def test_a_hanging_store_delays_nothing_and_is_reported(run, url, monkeypatch):
    uploader, resume_uploads = Uploader(url, run, keep_last=2), threading.Event()
    monkeypatch.setattr(uploader.store._fs, "put_file", lambda *_: resume_uploads.wait(20))
    name = save(run, 1)
    began = time.monotonic()
    uploader.start()
    assert time.monotonic() - began < slowness()
    while not uploader.uploading:
        time.sleep(0.01)
    assert uploader.uploading == name
    uploader.set_deadline(0.2)
    while uploader.wait_a_second():
        pass
    assert "not uploaded in time" in json.loads(run.upload_file.read_text())["problem"]
    resume_uploads.set()


def test_the_later_of_two_runs_takes_over_a_store(run, url, tmp_path):
    first, second = Uploader(url, run, keep_last=1), ClaimedRun.claim(tmp_path / "other", world_size=1)
    save(run, 1)
    upload_all(first)
    save(second, 5)
    upload_all(Uploader(url, second, keep_last=1))
    save(run, 2)
    upload_all(first)
    assert "taken over by the run in" in first.problem
    assert list(in_store(url)) == [5]


def test_the_last_log_line_says_whether_it_is_uploaded(run, url, log):
    config = config_of(run.path, url)
    name = save(run, 1)
    log_upload_result(config)
    assert log[-1].startswith(f"ERROR NOT UPLOADED: {name} is only in {run.checkpoints}")
    run.release()
    upload_remaining(config)
    assert log[-1].startswith(f"INFO {name} has been uploaded to {url}")
    save(run, 2)
    log_upload_result(config)
    assert log[-1].startswith("ERROR NOT UPLOADED")


# Downloading


def test_the_newest_and_the_best_are_downloaded(run, url, tmp_path):
    there = ClaimedRun.claim(tmp_path / "there", world_size=1)
    names = [save(there, step, best=1) for step in (1, 2, 3)]
    upload_all(Uploader(url, there, keep_last=2))
    assert downloaded(run, url) == names[2]
    assert [path.name for path in checkpoints(run.checkpoints)] == [names[0], names[2]]
    assert [damage_of(path) for path in checkpoints(run.checkpoints)] == [None, None]
    assert (run.checkpoints / "latest").resolve().name == names[2]
    assert (run.checkpoints / "best").resolve().name == names[0]
    assert list(run.checkpoints.glob(".*")) == []


def test_a_download_that_was_killed_is_completed(run, url, tmp_path):
    """The best checkpoint is committed first; a run that resumed from it would repeat all epochs since."""
    there = ClaimedRun.claim(tmp_path / "there", world_size=1)
    names = [save(there, step, best=1) for step in (1, 2, 3)]
    upload_all(Uploader(url, there, keep_last=2))

    def killed(aside: Path, path: Path) -> None:
        if path.name == names[2]:
            raise SystemExit
        run.commit(aside, path)

    with pytest.raises(SystemExit):
        download_newest(Store(url), run, killed)
    assert [path.name for path in checkpoints(run.checkpoints)] == names[:1]
    found = find_resume_point(run, Store(url), lambda *_: None)
    assert found is not None
    assert found.name == names[2]
    assert [path.name for path in checkpoints(run.checkpoints)] == [names[0], names[2]]
    assert list(run.checkpoints.glob(".*")) == []


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "no manifest"])
def test_a_damaged_newest_is_skipped_for_the_previous(run, url, tmp_path, log, how):
    there = ClaimedRun.claim(tmp_path / "there", world_size=1)
    names = [save(there, step) for step in (1, 2)]
    upload_all(Uploader(url, there, keep_last=2))
    last = Path(url.removeprefix("file://")) / names[1]
    content = bytearray((last / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    if how == "missing":
        (last / "tensors.safetensors").unlink()
    elif how == "no manifest":
        (last / "manifest.json").unlink()
    else:
        (last / "tensors.safetensors").write_bytes(content if how == "flipped" else content[:-3])
    assert downloaded(run, url) == names[0]
    assert [path.name for path in checkpoints(run.checkpoints)] == names[:1]
    assert not Store(url).is_committed(names[1])
    if how != "no manifest":
        assert any("ERROR" in line and f"{names[1]} is damaged" in line for line in log)
        upload_all(Uploader(url, there, keep_last=2))
        assert damage_of(last) is None


def test_an_empty_store_has_nothing_to_download(run, url):
    assert downloaded(run, url) is None


# Before training


def test_probing_a_new_folder_creates_it_and_leaves_it_empty(tmp_path, url):
    assert has_run(config_of(tmp_path / "run", url)) is False
    assert list(Path(url.removeprefix("file://")).iterdir()) == []


def test_a_store_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"^checkpoint\.upload_to = file://.*; fix permissions, free space, or name another"
    ):
        has_run(config_of(tmp_path / "run", f"file://{tmp_path}/file/there"))


def test_a_run_that_has_saved_resumes_without_its_store(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path / "run", f"file://{tmp_path}/file/there")
    save(RunFolder(tmp_path / "run"), 1, config=config)
    assert has_run(config) is False
    assert capsys.readouterr().err.startswith("warning: checkpoint.upload_to = file://")


def test_a_run_folder_behind_the_store_is_a_warning(tmp_path, url, capsys):
    config, there = config_of(tmp_path / "run", url), ClaimedRun.claim(tmp_path / "there", world_size=1)
    save(there, 9, config=config)
    upload_all(Uploader(url, there, keep_last=2))
    save(RunFolder(tmp_path / "run"), 5, config=config)
    assert has_run(config) is True
    assert f"{url} has step 9, but the run resumes from step 5" in capsys.readouterr().err
    upload_all(Uploader(url, ClaimedRun.claim(tmp_path / "run", world_size=1), keep_last=2))
    assert list(in_store(url)) == [5, 9]


def test_a_different_experiment_in_the_store_is_refused(tmp_path, url):
    there = ClaimedRun.claim(tmp_path / "there", world_size=1)
    save(there, 1, config=config_of(there.path, url))
    upload_all(Uploader(url, there, keep_last=2))
    assert has_run(config_of(tmp_path / "run", url)) is True
    with pytest.raises(InputError) as caught:
        checked_config(
            [
                "--run_dir",
                str(tmp_path / "run"),
                "--data.name",
                "generated10",
                "--seed",
                "3",
                "--checkpoint.upload_to",
                url,
            ],
            Topology(),
        )
    assert caught.value.lines == (
        f"{url}: seed = 3: this run was started with 0",
        "a resumed run keeps its experiment: restore these settings, or give another --checkpoint.upload_to",
    )
    assert not (tmp_path / "run").exists()


def test_auto_precision_is_that_of_the_run_in_the_store(tmp_path, url):
    """An empty run folder on a machine with other instructions: the run keeps its precision."""
    there = ClaimedRun.claim(tmp_path / "there", world_size=1)
    save(there, 1, config=config_of(there.path, url, "--precision", "float16"))
    upload_all(Uploader(url, there, keep_last=2))
    config = config_of(tmp_path / "run", url, "--precision", "auto")
    assert with_precision(config, torch.device("cpu"), saved_content).precision == "float16"


def test_a_run_resumed_from_a_store_needs_no_init_from(tmp_path, url):
    there = ClaimedRun.claim(tmp_path / "there", world_size=1)
    arguments = ["--init_from", str(tmp_path / "gone")]
    save(there, 1, config=config_of(there.path, url, *arguments))
    upload_all(Uploader(url, there, keep_last=2))
    command = [
        "--run_dir",
        str(tmp_path / "run"),
        "--data.name",
        "generated10",
        "--checkpoint.upload_to",
        url,
        *arguments,
    ]
    assert checked_config(command, Topology())[1] is False
    assert checked_config(command, Topology(rank=1, world_size=2))[1] is False


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for url, package in (("s3://bucket/x", "s3fs"), ("gs://bucket", "gcsfs")):
        with pytest.raises(InputError, match=f"pip install {package}$"):
            has_run(config_of(tmp_path / "run", url))


def test_a_store_that_does_not_answer_is_refused_in_time(tmp_path, url, monkeypatch):
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(object_store.Store, "probe", lambda _: time.sleep(5))
    with pytest.raises(InputError, match=r"no answer within 0\.1 s; check the network"):
        has_run(config_of(tmp_path / "run", url))


def test_without_upload_to_no_store_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(upload.Store, "__init__", None)
    log_upload_result(from_command_line(["--run_dir", str(tmp_path), "--data.name", "generated10"]).config)
    upload_remaining(from_command_line(["--run_dir", str(tmp_path), "--data.name", "generated10"]).config)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (FileNotFoundError, "create it, or name another"),
        (PermissionError, "set other credentials"),
        (type("NoCredentialsError", (Exception,), {}), "set other credentials"),
        (OSError, "check the network"),
    ],
)
def test_each_store_failure_has_its_remedy_in_one_line(kind, remedy):
    store = Store("s3://bucket/x")
    with pytest.raises(StoreError, match=remedy) as caught, store._store_errors():
        raise kind("what the store\nsaid")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_local_file_is_not_blamed_on_the_store(number, tmp_path):
    error = OSError(number, os.strerror(number), str(tmp_path / "tensors.safetensors"))
    with pytest.raises(StoreError) as caught, Store("s3://bucket/x")._store_errors(local=tmp_path):
        raise error
    assert str(caught.value) == f"{tmp_path}: {os.strerror(number)}; free disk space there, or fix permissions"
