import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from loguru import logger
from torch import Tensor, nn

from distributed.checkpoint import snapshot
from distributed.checkpoint import writer as module
from distributed.checkpoint.checkpointer import Checkpointer
from distributed.checkpoint.resume_point import load_tensors
from distributed.checkpoint.save_budget import SaveBudget
from distributed.checkpoint.snapshot import write_checkpoint
from distributed.checkpoint.tensor_file import read_tensors
from distributed.config import from_command_line
from distributed.config.optim import Sgd
from distributed.engine.model_state import ModelState
from distributed.errors import InputError, StorageError
from distributed.optim.schedules import Constant
from distributed.run import checkpoint_layout
from distributed.run.checkpoint_changes import delete_old, delete_unfinished, set_link
from distributed.run.checkpoint_layout import FORMAT, checkpoints, damage_of, name_of, newest_saved, preferred
from distributed.run.claim import ClaimedRun
from distributed.run.resume_checks import check_run_folder
from distributed.training.state import Best, TrainState


class PlainEngine:
    """The part of an engine that checkpoints use."""

    def __init__(self, fill: float) -> None:
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.weights = ModelState(Sgd(momentum=0.9), self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(fill)

    def step(self) -> None:
        self.model(torch.randn(4, 3)).square().sum().backward()
        self.weights.step(0.1, step=0)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.load(tensors)


def at_step(step: int, best: int | None = None) -> TrainState:
    return TrainState(Constant(1.0), epoch=1, step=step, best=None if best is None else Best(0, best, 0.5))


def three_epochs(writer: Checkpointer) -> TrainState:
    """Save epochs whose weights are 1, 2 and 3; the second is the best."""
    for epoch in (1, 2, 3):
        state = TrainState(Constant(1.0), epoch=epoch, step=epoch, best=Best(1, 2, 0.5) if epoch > 1 else None)
        writer.save_epoch(PlainEngine(epoch), state, is_best=epoch == 2, is_last=False)  # type: ignore[arg-type]
        writer.wait()
    return state


@pytest.fixture
def run(tmp_path) -> Iterator[ClaimedRun]:
    claimed = ClaimedRun.claim(tmp_path / "run", world_size=1)
    yield claimed
    claimed.release()


@pytest.fixture
def log() -> Iterator[list[str]]:
    messages: list[str] = []
    handle = logger.add(lambda message: messages.append(str(message)), format="{level} {message}")
    yield messages
    logger.remove(handle)


def checkpointer(run: ClaimedRun, keep_last: int = 9) -> Checkpointer:
    return Checkpointer(run.checkpoints, run, keep_last=keep_last, metadata={"bits": {"threads": 1}})


def saved(run: ClaimedRun, *steps: int) -> list[Path]:
    """Save checkpoints at these steps, with weights equal to the step."""
    writer = checkpointer(run)
    for step in steps:
        writer.save(PlainEngine(step), at_step(step))  # type: ignore[arg-type]
        writer.wait()
    return checkpoints(run.checkpoints)


def resumed(run: ClaimedRun) -> tuple[PlainEngine, TrainState, dict | None]:
    engine, state = PlainEngine(-1), at_step(0)
    return engine, state, checkpointer(run).resume(engine, state)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resuming_loads_every_tensor_and_the_counters(run):
    engine, writer = PlainEngine(0.5), checkpointer(run)
    engine.step()
    engine.model.to(torch.float32)
    writer.save(engine, at_step(7, best=7))  # type: ignore[arg-type]
    writer.wait()
    again, state, content = resumed(run)
    assert content is not None
    assert content["bits"] == {"threads": 1}
    assert state == at_step(7, best=7)
    expected, found = dict(engine.state()), dict(again.state())
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_digests_outlive_their_checkpoints(run):
    writer, engine = checkpointer(run, keep_last=1), PlainEngine(0.5)
    for step in (1, 2, 3):
        writer.save(engine, at_step(step))  # type: ignore[arg-type]
        writer.wait()
        if step == 2:
            engine.step()
    assert len(checkpoints(run.checkpoints)) == 1
    lines = [json.loads(line) for line in run.digests_file.read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"step-{step:08d}-epoch-001" for step in (1, 2, 3)]
    assert lines[0]["tensors"] == lines[1]["tensors"]
    assert lines[2]["tensors"].keys() == lines[1]["tensors"].keys() == dict(engine.state()).keys()
    assert lines[2]["tensors"]["model.0.weight"] != lines[1]["tensors"]["model.0.weight"]


def test_resuming_from_an_empty_folder_loads_nothing(run):
    _, state, content = resumed(run)
    assert content is None
    assert state == at_step(0)


def test_a_checkpoint_has_three_files_and_is_complete(run):
    (path,) = saved(run, 313)
    assert path.name == "step-00000313-epoch-001"
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert damage_of(path) is None
    assert names(run.checkpoints) == ["latest", "step-00000313-epoch-001"]
    assert (run.checkpoints / "latest").resolve() == path.resolve()


def test_a_save_copies_the_state_at_the_time_of_the_call(run):
    engine, writer = PlainEngine(1.0), checkpointer(run)
    state = at_step(1)
    writer.save(engine, state)  # type: ignore[arg-type]
    with torch.no_grad():
        engine.model[0].weight.fill_(2.0)
    state.finish_step(5)
    writer.wait()
    again, restored_state, _ = resumed(run)
    assert bool((again.model[0].weight == 1).all())
    assert restored_state.step == 1


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_damage(run, file):
    (path,) = saved(run, 1)
    (path / file).unlink()
    assert damage_of(path)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("left", [0, 1, 0.5])
def test_a_truncated_file_is_damage(run, file, left):
    (path,) = saved(run, 1)
    size = (path / file).stat().st_size
    os.truncate(path / file, int(size * left) if isinstance(left, float) else left)
    assert damage_of(path)


def test_an_extended_file_is_damage(run):
    (path,) = saved(run, 1)
    with (path / "state.json").open("a") as file:
        file.write(" ")
    assert damage_of(path)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_flipped_bit_anywhere_is_damage(run, file):
    (path,) = saved(run, 1)
    content = (path / file).read_bytes()
    for at in range(0, len(content), 37):
        (path / file).write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert damage_of(path), f"byte {at}"
    (path / file).write_bytes(content)
    assert damage_of(path) is None


def test_a_flipped_bit_of_the_manifest_is_damage(run):
    (path,) = saved(run, 1)
    content = (path / "manifest.json").read_bytes()
    for at in range(len(content)):
        changed = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        (path / "manifest.json").write_bytes(changed)
        assert damage_of(path), f"byte {at}: {changed!r}"


@pytest.mark.parametrize("form", [0, -1, 1.5, "2", None])
def test_a_manifest_of_an_unknown_format_is_damage(run, form):
    (path,) = saved(run, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": form}))
    assert damage_of(path) == "no manifest of a known format"


def test_a_damaged_newest_is_set_aside_and_the_previous_resumed(run, log):
    *_, last = saved(run, 1, 2, 3)
    (last / "tensors.safetensors").write_bytes(b"garbage")
    engine, state, _ = resumed(run)
    assert state.step == 2
    assert bool((engine.model[0].weight == 2).all())
    assert [line.split()[0] for line in log] == ["ERROR"]
    assert "step-00000003-epoch-001 is damaged" in log[0]
    assert [path.name for path in checkpoints(run.checkpoints)] == [
        "step-00000001-epoch-001",
        "step-00000002-epoch-001",
    ]
    assert (run.checkpoints / "step-00000003-epoch-001.damaged").is_dir()


def test_a_damaged_step_can_be_saved_and_damaged_again(run):
    for _ in range(2):
        *_, last = saved(run, 1, 2) if not checkpoints(run.checkpoints) else saved(run, 2)
        (last / "manifest.json").unlink()
        assert resumed(run)[1].step == 1
    assert resumed(run)[1].step == 1


def test_a_run_without_a_complete_checkpoint_never_restarts(run):
    for path in saved(run, 1, 2):
        (path / "manifest.json").write_text("{")
    before = names(run.checkpoints)
    with pytest.raises(InputError, match="no complete one is left"):
        resumed(run)
    assert names(run.checkpoints) == before


def test_unfinished_saves_of_a_killed_attempt_are_deleted(run):
    saved(run, 1)
    write_checkpoint(run.checkpoints / ".writing-00000002", {"a": torch.ones(1)}, {})
    (run.checkpoints / ".deleting-step-00000000").mkdir()
    assert resumed(run)[1].step == 1
    assert names(run.checkpoints) == ["latest", "step-00000001-epoch-001"]


def test_resuming_ignores_the_links(run):
    saved(run, 1, 2)
    set_link(run.checkpoints, "latest", "step-00000077-epoch-001")
    assert resumed(run)[1].step == 2


@pytest.mark.parametrize("links", ["lost", "followed"])
def test_a_copied_run_has_the_same_best_checkpoint(run, links):
    """scp and zip follow links, other programs drop them."""
    writer = checkpointer(run)
    for step, best in ((1, 1), (2, 2), (3, 2)):
        writer.save(PlainEngine(step), at_step(step, best))
        writer.wait()
        for name in ("best", "latest") if step < 3 else ():
            link = run.checkpoints / name
            target = link.resolve()
            link.unlink()
            if links == "followed":
                shutil.copytree(target, link)
    assert preferred(run.checkpoints)[0].resolve().name == name_of(step=2, epoch=1)
    assert (run.checkpoints / "latest").resolve().name == name_of(step=3, epoch=1)
    for name in ("best", "latest"):
        (run.checkpoints / name).unlink()
        if links == "followed":
            shutil.copytree(run.checkpoints / name_of(step=3, epoch=1), run.checkpoints / name)
    assert preferred(run.checkpoints)[0].resolve().name == name_of(step=2, epoch=1)


def test_a_checkpoint_may_be_deleted_while_it_is_read(run, monkeypatch):
    writer = Checkpointer(run.checkpoints, run, keep_last=2, metadata={"bits": {}, "config": {}})
    for step in (1, 2):
        writer.save(PlainEngine(step), at_step(step))
        writer.wait()
    old, new = checkpoints(run.checkpoints)
    digest_of = checkpoint_layout.digest_of

    def delete_first(path):
        shutil.rmtree(new, ignore_errors=True)
        return digest_of(path)

    monkeypatch.setattr(checkpoint_layout, "digest_of", delete_first)
    assert newest_saved(run.checkpoints).checkpoint == old


def test_the_last_checkpoints_and_the_best_are_kept(run):
    saved(run, 1, 2, 3, 4, 5)
    newest = name_of(step=5, epoch=1)
    delete_old(run.checkpoints, newest=newest, keep_last=2, keep={name_of(step=2, epoch=1)})
    assert [path.name[12] for path in checkpoints(run.checkpoints)] == ["2", "4", "5"]
    delete_old(run.checkpoints, newest=newest, keep_last=1, keep=())
    assert [path.name[12] for path in checkpoints(run.checkpoints)] == ["5"]


def test_a_save_keeps_the_best_and_links_to_it(run):
    writer = checkpointer(run, keep_last=1)
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        writer.save(PlainEngine(step), at_step(step, best))  # type: ignore[arg-type]
        writer.wait()
        assert (run.checkpoints / "best").resolve().name == f"step-{best:08d}-epoch-001"
        assert (run.checkpoints / "latest").resolve().name == f"step-{step:08d}-epoch-001"
    assert names(run.checkpoints) == ["best", "latest", "step-00000004-epoch-001"]


def test_a_resume_finishes_the_commit_of_a_killed_attempt(run):
    """No later save may follow: the attempt may have been killed in its last one."""
    writer = checkpointer(run, keep_last=1)
    for step in (1, 2, 3):
        writer.save(PlainEngine(step), at_step(step, best=step))  # type: ignore[arg-type]
        writer.wait()
    complete = names(run.checkpoints), run.digests_file.read_text()
    shutil.copytree(run.checkpoints / name_of(step=3, epoch=1), run.checkpoints / "copy")
    content = json.loads((run.checkpoints / "copy/state.json").read_text())
    content["state"] |= {"step": 2, "best": {"epoch": 0, "step": 2, "value": 0.5}}
    write_checkpoint(run.checkpoints / name_of(step=2, epoch=1), {"x": torch.zeros(1)}, content)
    shutil.rmtree(run.checkpoints / "copy")
    for link in ("best", "latest"):
        set_link(run.checkpoints, link, name_of(step=2, epoch=1))
    run.digests_file.write_text("".join(complete[1].splitlines(keepends=True)[:2]))
    next_attempt = checkpointer(run, keep_last=1)
    next_attempt.resume(PlainEngine(0), at_step(0))  # type: ignore[arg-type]
    next_attempt.wait()
    assert (names(run.checkpoints), run.digests_file.read_text()) == complete
    assert preferred(run.checkpoints)[0].resolve().name == name_of(step=3, epoch=1)
    resumed(run)
    assert run.digests_file.read_text() == complete[1], "recorded once"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE, errno.EIO])
def test_a_checkpoint_out_of_reach_is_not_damaged(run, monkeypatch, number):
    """E.g. saved by another user of the folder, or on a file system that is away for a moment."""
    *_, last = saved(run, 1, 2)
    before, opens = names(run.checkpoints), os.open

    def out_of_reach(path, *arguments, **options):
        if Path(path).parent.name == last.name:
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", out_of_reach)
        with pytest.raises(StorageError, match=rf"{last.name}.*: {os.strerror(number)}"):
            resumed(run)
    assert names(run.checkpoints) == before
    assert resumed(run)[1].step == 2


def test_deleting_unfinished_saves_keeps_checkpoints(run):
    before = saved(run, 1, 2)
    delete_unfinished(run.checkpoints)
    assert checkpoints(run.checkpoints) == before


def test_saving_the_same_step_twice_writes_once(run):
    (path,) = saved(run, 1)
    before = (path / "manifest.json").stat().st_ino
    again = checkpointer(run)
    engine, state = PlainEngine(9), at_step(0)
    again.resume(engine, state)  # type: ignore[arg-type]
    again.save(engine, state)  # type: ignore[arg-type]
    again.wait()
    assert (path / "manifest.json").stat().st_ino == before


def test_a_superseded_attempt_writes_nothing(run):
    writer = checkpointer(run)
    (run.path / "attempt.json").write_text(json.dumps({"token": "another", "pid": 1, "host": "there"}))
    writer.save(PlainEngine(1), at_step(1))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="taken over by process 1 on there"):
        writer.wait()
    assert names(run.checkpoints) == []


def test_a_full_disk_is_one_line_and_keeps_earlier_checkpoints(run, monkeypatch):
    saved(run, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "write_tensors", full)
    writer = checkpointer(run)
    writer.save(PlainEngine(2), at_step(2))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="No space left on device") as caught:
        writer.wait()
    assert "\n" not in str(caught.value)
    assert names(run.checkpoints) == ["latest", "step-00000001-epoch-001"]
    assert resumed(run)[1].step == 1


def test_a_checkpoint_of_another_model_is_refused(run):
    saved(run, 1)
    engine = PlainEngine(0)
    engine.weights = ModelState(Sgd(), nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    with pytest.raises(ValueError, match=r"model\.0\.weight"):
        checkpointer(run).resume(engine, at_step(0))  # type: ignore[arg-type]


def test_only_the_rank_with_the_claimed_run_writes(run):
    other = Checkpointer(run.checkpoints, None, keep_last=1, metadata={})
    other.save(PlainEngine(1), at_step(1))  # type: ignore[arg-type]
    other.wait()
    assert names(run.checkpoints) == []


def test_saves_are_uploaded_and_resumed_from_the_store(run, tmp_path):
    url = f"file://{tmp_path}/store"
    writer = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, upload_to=url)
    for step in (1, 2, 3):
        writer.save(PlainEngine(step), at_step(step, best=2))  # type: ignore[arg-type]
    writer.wait()
    assert names(tmp_path / "store") == ["attempt.json", "step-00000002-epoch-001", "step-00000003-epoch-001"]
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    again = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, upload_to=url)
    engine, state = PlainEngine(-1), at_step(0)
    again.resume(engine, state)  # type: ignore[arg-type]
    again.wait(stopping=True)
    assert state.step == 3
    assert bool((engine.model[0].weight == 3).all())
    assert names(run.checkpoints) == ["best", "latest", "step-00000002-epoch-001", "step-00000003-epoch-001"]


def test_a_checkpoint_is_kept_during_its_upload(run, tmp_path, monkeypatch):
    writer = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, upload_to=f"file://{tmp_path}/store")
    assert writer._uploader is not None
    resume_uploads, put = threading.Event(), writer._uploader.store._fs.put_file

    def slow(*paths: str) -> None:
        resume_uploads.wait(20)
        put(*paths)

    monkeypatch.setattr(writer._uploader.store._fs, "put_file", slow)
    writer.save(PlainEngine(1), at_step(1))  # type: ignore[arg-type]
    while not writer._uploader.uploading:
        time.sleep(0.01)
    for step in (2, 3, 4):
        writer.save(PlainEngine(step), at_step(step))  # type: ignore[arg-type]
    writer._wait_for_save()
    assert [path.name[12] for path in checkpoints(run.checkpoints)] == ["1", "4"]
    resume_uploads.set()
    writer.wait()
    assert [path.name[12] for path in checkpoints(run.checkpoints)] == ["4"]
    assert names(tmp_path / "store") == ["attempt.json", "step-00000004-epoch-001"]


def test_a_failing_store_ends_the_attempt_before_it_begins(run, tmp_path):
    (tmp_path / "file").write_text("")
    writer = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, upload_to=f"file://{tmp_path}/file/store")
    with pytest.raises(StorageError, match="the run has not started"):
        writer.resume(PlainEngine(0), at_step(0))  # type: ignore[arg-type]


class Clock:
    """A clock that advances by `save_seconds` per save, and otherwise only on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, save_seconds: float) -> None:
        self.now = 0.0
        write = snapshot.write_checkpoint

        def slow(*arguments: object) -> None:
            write(*arguments)
            self.now += save_seconds

        monkeypatch.setattr(module, "write_checkpoint", slow)

    def __call__(self) -> float:
        return self.now


def epochs(run: ClaimedRun, clock: Clock, *, seconds: float, count: int, best: int) -> list[int]:
    """Train `count` epochs of `seconds` each, of which `best` is the best. Returns the epochs that were saved."""
    writer = Checkpointer(run.checkpoints, run, keep_last=99, metadata={}, budget=SaveBudget(0.05, clock))
    found = []
    for epoch in range(1, count + 1):
        clock.now += seconds
        state = TrainState(Constant(1.0), epoch=epoch, step=10 * epoch)
        state.best = Best(best - 1, 10 * best, 0.5) if epoch >= best else None
        if writer.save_epoch(PlainEngine(epoch), state, is_best=epoch == best, is_last=epoch == count):  # type: ignore[arg-type]
            found.append(epoch)
            writer.wait()
    writer.wait()
    return found


def test_saves_take_at_most_a_twentieth_of_the_time(run, monkeypatch):
    clock = Clock(monkeypatch, save_seconds=2.0)
    found = epochs(run, clock, seconds=1.0, count=400, best=1)
    # A save of 2 s is allowed every 40 s. The first is free and the last always happens.
    assert found[:2] == [1, 78]
    assert found[-1] == 400
    assert 2.0 * (len(found) - 1) <= 0.05 * clock.now


def test_epochs_longer_than_twenty_saves_are_all_saved(run, monkeypatch):
    assert epochs(run, Clock(monkeypatch, save_seconds=0.1), seconds=2.1, count=9, best=4) == list(range(1, 10))


def test_an_unsaved_best_epoch_is_written_by_the_next_save(run, monkeypatch):
    found = epochs(run, Clock(monkeypatch, save_seconds=2.0), seconds=1.0, count=7, best=3)
    assert found == [1, 7]
    assert [path.name[-3:] for path in checkpoints(run.checkpoints)] == ["001", "003", "007"]
    best = run.checkpoints / "best"
    assert damage_of(best) is None
    assert read_tensors(best)["model.0.weight"].unique().tolist() == [3.0]
    assert json.loads((best / "state.json").read_text())["state"]["epoch"] == 3
    engine, state, _ = resumed(run)
    assert (state.epoch, state.best) == (7, Best(2, 30, 0.5))
    assert engine.model[0].weight.unique().tolist() == [7.0]


def test_an_unsaved_best_epoch_can_be_restored(run, monkeypatch):
    clock = Clock(monkeypatch, save_seconds=2.0)
    writer = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, budget=SaveBudget(0.05, clock))
    state = three_epochs(writer)
    engine = PlainEngine(9)
    writer.restore_best(engine, state)  # type: ignore[arg-type]
    assert engine.model[0].weight.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    "name", ["step-backup", "step-00000009-epoch-001.old", "step-00000009-epoch-001 (copy)", "step-9-epoch-1"]
)
def test_a_copy_with_an_invalid_name_is_ignored(run, name):
    saved(run, 1, 2)
    shutil.copytree(run.checkpoints / "step-00000001-epoch-001", run.checkpoints / name)
    writer = checkpointer(run, keep_last=1)
    assert writer.resume(PlainEngine(-1), state := at_step(0)) is not None  # type: ignore[arg-type]
    assert state.step == 2
    writer.save(PlainEngine(3), at_step(3))  # type: ignore[arg-type]
    writer.wait()
    assert names(run.checkpoints) == sorted(["latest", "step-00000003-epoch-001", name])
    assert (run.checkpoints / "latest").resolve().name == "step-00000003-epoch-001"


def test_checkpoints_are_sorted_by_step(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        (tmp_path / name_of(step=step, epoch=1)).mkdir()
    assert [int(path.name.split("-")[1]) for path in checkpoints(tmp_path)] == [7, 99_999_999, 100_000_000]


def test_a_checkpoint_of_a_newer_version_is_not_touched(run):
    saved(run, 1, 2)
    manifest = run.checkpoints / "step-00000002-epoch-001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    before = names(run.checkpoints)
    with pytest.raises(
        InputError, match="step-00000002-epoch-001: written by a newer version of this code, in format 2"
    ):
        check_run_folder(from_command_line(["--run_dir", str(run.path)]).config)
    with pytest.raises(InputError, match="written by a newer version of this code, in format 2"):
        resumed(run)
    assert names(run.checkpoints) == before


def test_without_a_limit_every_epoch_is_saved(run, monkeypatch):
    write = snapshot.write_checkpoint

    def slow(*arguments: object) -> None:
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", slow)
    writer = checkpointer(run)
    for epoch in (1, 2, 3):
        state = TrainState(Constant(1.0), epoch=epoch, step=epoch)
        assert writer.save_epoch(PlainEngine(epoch), state, is_best=False, is_last=False)  # type: ignore[arg-type]
    writer.wait()
    assert [path.name[-3:] for path in checkpoints(run.checkpoints)] == ["001", "002", "003"]


# Foreign files beside the run's own checkpoints, and failing deletions


def save(run: ClaimedRun, *steps: int, keep_last: int = 1) -> Checkpointer:
    writer = checkpointer(run, keep_last)
    for step in steps:
        writer.save(PlainEngine(step), at_step(step))  # type: ignore[arg-type]
        writer.wait()
    return writer


def test_a_copy_with_a_later_name_does_not_displace_others(run, log):
    writer = save(run, 1, 2)
    copy = run.checkpoints / name_of(step=99, epoch=9)
    shutil.copytree(run.checkpoints / name_of(step=2, epoch=1), copy)
    writer.save(PlainEngine(3), at_step(3))  # type: ignore[arg-type]
    writer.wait()
    assert names(run.checkpoints) == ["latest", name_of(step=3, epoch=1), copy.name]
    assert (run.checkpoints / "latest").resolve().name == name_of(step=3, epoch=1)
    assert resumed(run)[1].step == 3
    assert copy.with_name(f"{copy.name}.damaged").is_dir()
    assert "it holds step 2 after 1 epochs" in log[-1]


def test_a_copy_with_the_next_saves_name_is_set_aside(run):
    writer = save(run, 1)
    name = name_of(step=2, epoch=1)
    shutil.copytree(run.checkpoints / name_of(step=1, epoch=1), run.checkpoints / name)
    writer.save(PlainEngine(2), at_step(2))  # type: ignore[arg-type]
    writer.wait()
    assert names(run.checkpoints) == ["latest", name, f"{name}.damaged"]
    assert resumed(run)[1].step == 2


def test_setting_aside_overwrites_nothing(run):
    for content in ("first", "second", "third"):
        *_, last = saved(run, 1, 2) if content == "first" else saved(run, 2)
        (last / "manifest.json").write_text(content)
        resumed(run)
    found = [
        (run.checkpoints / f"{last.name}.damaged{more}" / "manifest.json").read_text() for more in ("", "-2", "-3")
    ]
    assert found == ["first", "second", "third"]


@pytest.mark.parametrize("kind", ["a file", "a broken link"])
def test_setting_aside_when_the_name_exists(run, kind):
    *_, last = saved(run, 1, 2)
    (last / "manifest.json").unlink()
    aside = last.with_name(f"{last.name}.damaged")
    aside.write_text("precious") if kind == "a file" else aside.symlink_to("nothing")
    assert resumed(run)[1].step == 1
    assert last.with_name(f"{last.name}.damaged-2").is_dir()


@pytest.mark.parametrize(
    "name", ["step-000000009-epoch-001", "step-00000009-epoch-0001", "step-00000009-epoch-001.damaged"]
)
def test_a_name_with_wider_numbers_is_no_checkpoint(run, name):
    first, _ = saved(run, 1, 2)
    shutil.copytree(first, run.checkpoints / name)
    assert [path.name for path in checkpoints(run.checkpoints)] == [name_of(step=step, epoch=1) for step in (1, 2)]


def test_deleting_a_linked_checkpoint_keeps_its_target(run, tmp_path):
    save(run, 1)
    moved = tmp_path / "elsewhere"
    (run.checkpoints / name_of(step=1, epoch=1)).rename(moved)
    (run.checkpoints / name_of(step=1, epoch=1)).symlink_to(moved)
    assert resumed(run)[1].step == 1
    save(run, 2)
    assert names(run.checkpoints) == ["latest", name_of(step=2, epoch=1)]
    assert damage_of(moved) is None


def test_a_failed_deletion_is_retried_by_the_next_save(run, log, monkeypatch):
    """E.g. on NFS while another client has one of its files open."""
    rmtree = shutil.rmtree

    def busy(path: Path, **_: object) -> None:
        if ".deleting-" in str(path):
            raise OSError(39, "Directory not empty", str(path))
        rmtree(path, **_)

    monkeypatch.setattr(shutil, "rmtree", busy)
    writer = save(run, 1, 2)
    assert names(run.checkpoints) == [f".deleting-{name_of(step=1, epoch=1)}", "latest", name_of(step=2, epoch=1)]
    assert [line.split()[0] for line in log] == ["WARNING"]
    assert "Directory not empty; training continues, and the next save tries again" in log[0]
    monkeypatch.undo()
    writer.save(PlainEngine(3), at_step(3))  # type: ignore[arg-type]
    writer.wait()
    assert names(run.checkpoints) == ["latest", name_of(step=3, epoch=1)]


def test_one_failed_deletion_does_not_prevent_others(run, monkeypatch):
    """E.g. a folder under `chattr +i`, which cannot be renamed either."""
    rename = Path.rename

    def immutable(self: Path, target: Path) -> Path:
        if self.name == name_of(step=1, epoch=1):
            raise OSError(1, "Operation not permitted", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", immutable)
    save(run, 1, 2, 3, 4)
    assert [path.name for path in checkpoints(run.checkpoints)] == [name_of(step=step, epoch=1) for step in (1, 4)]


@pytest.mark.parametrize("link", ["latest", ".latest", "best"])
def test_a_link_that_cannot_be_set_is_a_warning(run, log, link):
    (run.checkpoints / link / "precious").mkdir(parents=True)
    writer = checkpointer(run)
    for step in (1, 2):
        writer.save(PlainEngine(step), at_step(step, best=1))  # type: ignore[arg-type]
        writer.wait()
    assert [line.split(":")[0] for line in log] == [f"WARNING the link {link.removeprefix('.')} was not set"]
    assert (run.checkpoints / link / "precious").is_dir()
    assert resumed(run)[1].step == 2


def test_nothing_is_set_aside_if_the_resume_is_refused(run):
    *_, last = saved(run, 1, 2)
    (last / "manifest.json").unlink()
    before = names(run.checkpoints)

    def refuse(content: dict, path: Path) -> None:
        assert (content["state"]["step"], path.name) == (1, name_of(step=1, epoch=1))
        raise InputError("not ours")

    with pytest.raises(InputError, match="not ours"):
        checkpointer(run).resume(PlainEngine(0), at_step(0), validate=refuse)  # type: ignore[arg-type]
    assert names(run.checkpoints) == before


def test_a_failure_to_set_aside_is_one_line(run, monkeypatch):
    *_, last = saved(run, 1, 2)
    (last / "manifest.json").unlink()

    def denied(self: Path, _: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", denied)
    with pytest.raises(StorageError, match=f"{last.name}: Permission denied"):
        resumed(run)


def test_an_attempt_superseded_after_its_commit_sets_no_links(run, monkeypatch):
    writer = save(run, 1)
    commit = ClaimedRun.commit

    def superseded(self: ClaimedRun, aside: Path, path: Path) -> None:
        commit(self, aside, path)
        (run.path / "attempt.json").write_text(json.dumps({"token": "another", "pid": 1, "host": "there"}))

    monkeypatch.setattr(ClaimedRun, "commit", superseded)
    digests = run.digests_file.read_text()
    writer.save(PlainEngine(2), at_step(2))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="taken over by process 1 on there"):
        writer.wait()
    assert run.digests_file.read_text() == digests
    assert (run.checkpoints / "latest").readlink().name == name_of(step=1, epoch=1)
    assert len(checkpoints(run.checkpoints)) == 2


def test_a_run_folder_removed_during_a_save_is_reported(run, monkeypatch):
    def removed(*_: object) -> None:
        shutil.rmtree(run.path)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(snapshot, "write_tensors", removed)
    writer = checkpointer(run)
    writer.save(PlainEngine(1), at_step(1))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="the run folder was removed"):
        writer.wait()


def test_a_lost_run_with_an_empty_store_does_not_restart(run, tmp_path):
    for path in saved(run, 1):
        shutil.rmtree(path)
    again = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, upload_to=f"file://{tmp_path}/store")
    with pytest.raises(InputError, match="no complete one is left"):
        again.resume(PlainEngine(0), at_step(0))  # type: ignore[arg-type]


def test_a_lost_run_resumes_from_its_store(run, tmp_path):
    url = f"file://{tmp_path}/store"
    writer = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, upload_to=url)
    for step in (1, 2):
        writer.save(PlainEngine(step), at_step(step))  # type: ignore[arg-type]
        writer.wait()
    (newest,) = checkpoints(run.checkpoints)
    (newest / "tensors.safetensors").write_bytes(b"garbage")
    engine, state = PlainEngine(-1), at_step(0)
    again = Checkpointer(run.checkpoints, run, keep_last=1, metadata={}, upload_to=url)
    assert again.resume(engine, state) is not None  # type: ignore[arg-type]
    again.wait(stopping=True)
    assert state.step == 2
    assert names(run.checkpoints) == ["latest", newest.name, f"{newest.name}.damaged"]


def test_metrics_are_on_the_disk_before_the_checkpoint(run, monkeypatch):
    run.metrics_file.write_text('{"kind": "train", "epoch": 0, "step": 1}\n')
    order, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(os.fstat(handle).st_ino), fsync(handle))[1])
    monkeypatch.setattr(os, "rename", lambda *names: (order.append("rename"), rename(*names))[1])
    saved(run, 1)
    assert order.index(run.metrics_file.stat().st_ino) < order.index("rename")


def test_a_checkpoint_that_becomes_visible_late_is_read(run, tmp_path):
    """E.g. on another node of an NFS, right after rank 0 has downloaded it."""
    (path,) = saved(run, 1)
    hidden = path.rename(tmp_path / "hidden")
    threading.Timer(0.5, hidden.rename, [path]).start()
    assert "model.0.weight" in load_tensors(path)
