"""Damaged run folders and checkpoints: each gives one clear line and the right exit code, and nothing is lost."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.abuse import Outcome, assert_outcome, call, untouched
from kit.commands import ROOT, Command, assert_same_bits, attempts, status, torchrun
from kit.trained_runs import copy_of, write_test_images
from safetensors.torch import load_file, save_file

from distributed.files import digest_of

pytestmark = pytest.mark.timeout(200)
SETTINGS = (
    ROOT / "configs/debug.toml", "--data.train_samples", 60, "--data.test_samples", 20, "--global_batch_size", 20,
    "--schedule.name", "constant", "--checkpoint.keep_last", 3, "--checkpoint.every_steps", 1, "--data.validation_fraction",
    0, "--device", "cpu", "--logging.level", "WARNING", "--evaluation.batch_size", 20,
)  # fmt: skip
KINDS = {
    "empty": b"",
    "truncated": b'{"status": "fin',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a string": b'"x"',
    "not UTF-8": b"\xff\xfe\x00\x01",
    "deeply nested": b"[" * 5000,
    "an empty object": b"{}",
    "an object with other values": b'{"status": 3, "kind": "epoch", "event": [], "name": 1, "step": "x", "time": 0}',
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of three steps, with a checkpoint per step."""
    folder = tmp_path_factory.mktemp("abuse") / "run"
    found = call("train", *SETTINGS, "--run_dir", folder, "--epochs", 1)
    assert found.code == 0, found.err
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_images(tmp_path_factory.mktemp("images") / "new", 1)[0]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????-epoch-???"))


def train(run: Path, *arguments: object, epochs: int = 1) -> Outcome:
    return call("train", *SETTINGS, "--run_dir", run, "--epochs", epochs, *arguments)


def inspect(module: str, run: Path, image: Path) -> Outcome:
    """Run a command on a run, with as little work as possible."""
    arguments: dict[str, tuple[object, ...]] = {"predict": (image,), "export.__main__": ("--format", "safetensors")}
    return call(module, run, *arguments.get(module, ()))


def update_manifest(checkpoint: Path) -> None:
    """Make the manifest match the current files, and both links point to the checkpoint."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: list(digest_of(checkpoint / name)) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for link in ("latest", "best"):
        (checkpoint.parent / link).unlink(missing_ok=True)
        (checkpoint.parent / link).symlink_to(checkpoint.name)


# Files beside the checkpoints

# Damaging all at once would leave nothing to compare.
OTHER_FILES = {
    "all files but digests": ["status.json", "attempts.jsonl", "metrics.jsonl", "attempt.json"],
    "digests": ["digests.jsonl"],
}


@pytest.mark.parametrize("files", OTHER_FILES)
@pytest.mark.parametrize("kind", [*KINDS, "a folder", "missing"])
def test_commands_do_not_need_a_runs_other_files(
    files: str, kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "run"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("step-*", "latest", "best"))
    for file in OTHER_FILES[files]:
        (bare / file).unlink()
        if kind == "a folder":
            (bare / file).mkdir()
        elif kind != "missing":
            (bare / file).write_bytes(KINDS[kind])
    monkeypatch.setattr(
        "distributed.report.checkpoint_sections.augmented", lambda *_: []
    )  # slow, and depends on the data only
    monkeypatch.setattr("distributed.report.analysis.Analysis.__init__", lambda *_: None)
    monkeypatch.setattr("distributed.report.checkpoint_sections.filters", lambda *_: [])
    with untouched(run, bare):
        reported = call("report.__main__", bare, run, "--out", tmp_path / "report.html")
        assert_outcome(reported, code=0, lines=0)
        compared = call("compare", bare, run)
        assert_outcome(compared, code=0, lines=0)
        assert compared.out.startswith("bit-identical: ")


@pytest.mark.parametrize("kind", ["deeply nested", "a number"])
def test_a_finished_run_with_a_damaged_status_keeps_its_bits(kind: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / "status.json").write_bytes(KINDS[kind])
    assert_outcome(train(copy), code=0, lines=0)
    assert_same_bits(copy, run)


SHARED = [
    "attempt.json",
    "attempts.jsonl",
    "config.toml",
    "digests.jsonl",
    "metrics.jsonl",
    "status.json",
    "upload.json",
]
NOT_REGULAR: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a circular link": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("file", SHARED)
@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_a_run_that_cannot_write_a_file_is_refused(file: str, kind: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / file).unlink(missing_ok=True)
    NOT_REGULAR[kind](copy / file)
    with untouched(copy):
        assert_outcome(
            train(copy, epochs=2), f"{copy}/{file} is not a regular file; move it, or give another with --run_dir"
        )


@pytest.mark.parametrize("file", ["digests.jsonl", "metrics.jsonl", "status.json", "attempts.jsonl"])
@pytest.mark.parametrize("kind", ["a pipe", "an endless device"])
def test_commands_ignore_files_that_are_not_regular(file: str, kind: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / file).unlink()
    NOT_REGULAR[kind](copy / file)
    assert_outcome(call("compare", copy, run), code=0, lines=0)


@pytest.mark.parametrize("file", ["config.toml"])
@pytest.mark.parametrize(
    "kind", ["missing", "a folder", "truncated", "a list", "not UTF-8", "a number", "of another data set"]
)
@pytest.mark.parametrize("module", ["predict", "report.__main__"])
def test_a_damaged_config_is_refused(file: str, kind: str, module: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / file).unlink()
    if kind == "a folder":
        (copy / file).mkdir()
    elif kind == "of another data set":
        (copy / file).write_text('[data]\nname = "cifar1"')
    elif kind != "missing":
        (copy / file).write_bytes(KINDS[kind])
    with untouched(copy):
        assert_outcome(
            inspect(module, copy, image), f"{copy}", ".toml" if kind != "of another data set" else "data.name = cifar1"
        )


# Run folders that are invalid or another experiment's


@pytest.mark.parametrize(
    "kind", ["a file", "below a file", "a link to nothing", "a circular link", "logs a file", "saves a file"]
)
def test_a_run_folder_that_is_not_a_folder_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "a file":
        path.write_text("precious")
    elif kind == "below a file":
        (tmp_path / "text").write_text("precious")
        path = tmp_path / "text" / "run"
    elif kind in ("a link to nothing", "a circular link"):
        path.symlink_to(tmp_path / ("nothing" if "nothing" in kind else "run"))
    else:
        path.mkdir()
        (path / ("logs" if "logs" in kind else "checkpoints")).write_text("precious")
    with untouched(tmp_path):
        assert_outcome(train(path), f"run_dir = {path}: ", "is not a folder; move it, or give another with --run_dir")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", 1], "seed = 1: this run was started with 0"),
        (["--model.name", "cifar_alexnet"], "model.name = cifar_alexnet: this run was started with improved_alexnet"),
        (["--optim.lr", 0.5], "optim.lr = 0.5: this run was started with 0.1"),
        (["--exact.shards", 4], "exact.shards = 4: this run was started with 8"),
    ],
)
def test_a_run_folder_of_another_experiment_is_refused(arguments: list[object], message: str, run: Path) -> None:
    with untouched(run):
        assert_outcome(train(run, *arguments), message, "give another --run_dir", lines=2)


# Damaged checkpoints: a run resumes from the previous one, other commands refuse them


def flip(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return change


def truncate(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size - 9)


def empty(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: os.truncate(checkpoint / name, 0)


def delete(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def swap(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: shutil.copy(min(checkpoint.parent.glob("step-*")) / name, checkpoint / name)


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        make(checkpoint / name)

    return change


def in_manifest(**values: Any) -> Callable[[Path], object]:
    def change(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text()) | values
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return change


TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"{name} flipped": flip(name) for name in (TENSORS, STATE)},
    **{f"{name} truncated": truncate(name) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} empty": empty(name) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} missing": delete(name) for name in (TENSORS, STATE)},
    **{f"{name} of another": swap(name) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} a folder": replace(name, Path.mkdir) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} a pipe": replace(name, os.mkfifo) for name in (TENSORS, STATE)},
    f"{TENSORS} a circular link": replace(TENSORS, lambda path: path.symlink_to(path)),
    "a manifest of another format": in_manifest(format=2),
    "a manifest without files": in_manifest(files={}),
    "a manifest with files as a list": in_manifest(files=[]),
    "a manifest with other files": in_manifest(files={"model.pt": [1, "x"]}),
    "a manifest with wrong digests": in_manifest(files={TENSORS: None, STATE: 5}),
}
RESUMED_FROM = [
    "tensors.safetensors flipped",
    "state.json truncated",
    "manifest.json of another",
    "tensors.safetensors a pipe",
]


@pytest.mark.parametrize("case", DAMAGES)
def test_commands_refuse_a_damaged_checkpoint(case: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    DAMAGES[case](newest(copy))
    with untouched(copy):
        assert_outcome(
            inspect("predict", copy, image),
            str(copy),
            *_message_of(case),
        )


def _message_of(case: str) -> tuple[str, ...]:
    if case == "a manifest of another format":
        return ("written by a newer version",)
    return ("--checkpoint",) if "manifest.json a folder" in case else ("damaged: ", "--checkpoint")


def test_a_run_of_a_newer_version_is_not_touched(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        DAMAGES["a manifest of another format"](checkpoint)
    (copy / "status.json").unlink()
    with untouched(copy):
        assert_outcome(train(copy), "written by a newer version of this code, in format 2 (this one reads up to 1)")


# Checkpoints that are complete by their digests, but of another run or version


def in_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / TENSORS)
        change(tensors)
        save_file(tensors, str(checkpoint / TENSORS))

    return changed


def in_state(**values: Any) -> Callable[[Path], object]:
    def change(checkpoint: Path) -> None:
        content = json.loads((checkpoint / STATE).read_text()) | values
        (checkpoint / STATE).write_text(json.dumps(content))

    return change


def as_state(content: bytes) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / STATE).write_bytes(content)


def reshaped(tensors: dict[str, Any]) -> None:
    tensors["model.fc2.weight"] = tensors["model.fc2.weight"][:, :5].contiguous()


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors of another shape": (in_tensors(reshaped), "fc2.weight"),
    "no tensors": (in_tensors(dict.clear), "conv.0.weight"),
    "an extra tensor": (in_tensors(lambda t: t.update({"model.more": t["model.fc3.bias"].clone()})), "more"),
    "a missing tensor": (in_tensors(lambda t: t.pop("model.fc3.bias")), "fc3.bias"),
    "tensors in another format": (
        lambda checkpoint: (checkpoint / TENSORS).write_bytes(b"junk" * 99),
        "tensors.safetensors",
    ),
    "an empty tensor file": (lambda checkpoint: (checkpoint / TENSORS).write_bytes(b""), "tensors.safetensors"),
}
STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"a state that is {kind}": (as_state(KINDS[kind]), "state") for kind in ("empty", "a list", "deeply nested")},
    "counters as a list": (in_state(state=[]), "state.json: state is missing or from another version"),
    "no counters": (in_state(state={}), "state.json: epoch is missing"),
    "a config of a later version": (in_state(config={"lookahead": 3}), "a config that this version cannot read ("),
}  # fmt: skip


@pytest.mark.parametrize("case", [*OTHERS, *STATES])
def test_a_complete_foreign_checkpoint_is_not_resumed(case: str, run: Path, tmp_path: Path) -> None:
    change, message = (OTHERS | STATES)[case]
    copy = copy_of(run, tmp_path / "run")
    change(newest(copy))
    update_manifest(newest(copy))
    with untouched(copy / "checkpoints"):
        found = train(copy, epochs=2)
    assert_outcome(found, message, str(copy), "give another --run_dir")


def in_counters(*path: str, value: Any) -> Callable[[Path], object]:
    """Change one of the counters in state.json."""

    def change(checkpoint: Path) -> None:
        content = json.loads((checkpoint / STATE).read_text())
        *parents, last = ("state", *path)
        inner = content
        for key in parents:
            inner = inner[key]
        inner[last] = value
        (checkpoint / STATE).write_text(json.dumps(content))

    return change


NUMBERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an epoch as text": (in_counters("epoch", value="1"), "epoch = '1': input should be a valid integer"),
    "half an epoch": (in_counters("epoch", value=0.5), "epoch = 0.5: input should be a valid integer"),
    "an epoch as a list": (in_counters("epoch", value=[1]), "epoch = [1]: input should be a valid integer"),
    "a negative epoch": (in_counters("epoch", value=-1), "epoch = -1: input should be greater than or equal to 0"),
    "an epoch that is NaN": (in_counters("epoch", value=float("nan")), "epoch = nan: input should be a valid integer"),
    "an epoch beyond the run": (in_counters("epoch", value=5), "epoch = 5 is beyond the 1 of the run"),
    "an epoch too low": (in_counters("epoch", value=0), "step = 3 does not agree with epoch = 0 and step_in_epoch = 0"),
    "a missing step": (in_counters("step", value=None), "step = None: input should be a valid integer"),
    "an infinite step": (in_counters("step", value=float("inf")), "step = inf: input should be a valid integer"),
    "a huge step": (in_counters("step", value=10**300), "step = 1000"),
    "a negative step": (in_counters("step", value=-3), "step = -3: input"),
    "steps after the last epoch": (in_counters("step_in_epoch", value=2), "step_in_epoch = 2 is beyond the 1 epochs"),
    "negative steps of an epoch": (in_counters("step_in_epoch", value=-1), "step_in_epoch = -1: input"),
    "samples as a boolean": (in_counters("samples_seen", value=True), "samples_seen = True: input"),
    "samples of another run": (in_counters("samples_seen", value=61), "samples_seen = 61 does not agree with step = 3"),
    "an unwanted best epoch": (
        in_counters("best", value={"epoch": 0, "step": 3, "value": 0.5}), "best is epoch 0, but checkpoint.best_by = none",
    ),
    "a best epoch that is a number": (in_counters("best", value=3), "best = 3: input should be"),
    "a window that is a list": (in_counters("window", value=[]), "window = []: input should be"),
    "a window of samples not yet seen": (in_counters("window", "count", value=20), "window and epoch_totals count 20 samples"),
    "a window's loss that is NaN": (in_counters("window", "loss", value=float("nan")), "window.loss = nan: input"),
    "negative correct predictions": (in_counters("epoch_totals", "correct", value=-1), "epoch_totals.correct = -1: input"),
    "a schedule's drops": (in_counters("schedule", value={"drops": 3}), "schedule constant has no state, but found ['drops']"),
    "an early stop": (
        in_counters("early_stopping", value={"best": 0.5, "bad_epochs": 0, "stopped": True}), "early_stopping = ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "epochs"), [(case, 1 + place % 2) for place, case in enumerate(NUMBERS)])
def test_counters_of_another_run_are_refused(case: str, epochs: int, run: Path, tmp_path: Path) -> None:
    change, message = NUMBERS[case]
    copy = copy_of(run, tmp_path / "run")
    change(newest(copy))
    update_manifest(newest(copy))
    with untouched(copy):
        found = train(copy, epochs=epochs)
    assert_outcome(found, f"{newest(copy)}: state.json: {message}", "; move it away, or give another --run_dir")


@pytest.mark.parametrize("module", ["evaluate", "predict", "export.__main__"])
def test_commands_ignore_training_counters(module: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    NUMBERS["an epoch as text"][0](newest(copy))
    update_manifest(newest(copy))
    assert_outcome(inspect(module, copy, image), code=0, lines=0)


def test_more_steps_than_an_epoch_has_are_refused(run: Path, tmp_path: Path) -> None:
    """Detected once the data is known: state.json alone does not say how many steps an epoch has."""
    copy = copy_of(run, tmp_path / "run")
    shutil.rmtree(newest(copy))
    last = newest(copy).rename(copy / "checkpoints" / "step-00000004-epoch-000")
    for key, value in {"step": 4, "step_in_epoch": 4, "samples_seen": 80}.items():
        in_counters(key, value=value)(last)
    in_counters("window", "count", value=80)(last)
    update_manifest(last)
    with untouched(copy / "checkpoints"):
        assert_outcome(train(copy), f"{last}: state.json: step_in_epoch = 4 is beyond the 3 steps of an epoch")


# A finished run


@pytest.mark.parametrize("how", ["deleted", *RESUMED_FROM])
def test_a_finished_run_without_its_last_checkpoint_redoes_it(how: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    name = newest(copy).name
    DAMAGES.get(how, shutil.rmtree)(newest(copy))
    found = train(copy)
    assert "this run is finished" not in found.err
    messages = () if how == "deleted" else (f"{name} is damaged (", f"set aside as {name}.damaged")
    assert_outcome(found, *messages, code=0, lines=len(messages) and 1)
    assert newest(copy).name == name
    shutil.rmtree(copy / "checkpoints" / f"{name}.damaged", ignore_errors=True)
    assert_same_bits(copy, run)


@pytest.mark.parametrize("how", ["deleted", "manifest.json missing", "set aside", "emptied", "a folder of files"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_without_any_checkpoint_does_not_restart(how: str, epochs: int, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    for path in (copy / "checkpoints").glob("step-*"):
        if how == "set aside":
            path.rename(path.with_name(f"{path.name}.damaged"))
        elif how == "manifest.json missing":
            (path / MANIFEST).unlink()
        else:
            shutil.rmtree(path)
    if how == "emptied":
        (copy / "digests.jsonl").write_text("")
    elif how == "a folder of files":
        shutil.rmtree(copy / "checkpoints")
        (copy / "status.json").unlink()
    with untouched(copy):
        assert_outcome(
            train(copy, epochs=epochs), f"run_dir = {copy}: this run has saved", "no complete one is left", "copy, or"
        )


def test_damaged_tensors_in_all_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    """Detected when the run starts: computing the digests of all tensors before that would take too long."""
    copy = copy_of(run, tmp_path / "run")
    for path in (copy / "checkpoints").glob("step-*"):
        flip(TENSORS)(path)
    with untouched(copy / "checkpoints"):
        assert_outcome(train(copy, epochs=2), "this run has saved", "no complete one is left in")


@pytest.mark.parametrize("status", ["running", "failed", "stopped", "missing"])
def test_a_run_without_a_finished_status_trains_no_further(status: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    content = json.loads((copy / "status.json").read_text())
    (copy / "status.json").unlink()
    if status != "missing":
        (copy / "status.json").write_text(json.dumps(content | {"status": status}))
    assert_outcome(train(copy), code=0, lines=0)
    assert_same_bits(copy, run)


@pytest.mark.parametrize("arguments", [(), ("--logging.every_steps", 1)])
def test_fewer_epochs_than_trained_are_refused(arguments: tuple[object, ...], run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    assert train(copy, epochs=2).code == 0
    with untouched(copy):
        assert_outcome(
            train(copy, *arguments),
            f"epochs = 1: the run in {copy} has already trained 2 epochs; give --epochs 2 or more",
        )


def test_fewer_epochs_than_started_are_refused(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    assert train(copy, epochs=2).code == 0
    shutil.rmtree(newest(copy))
    with untouched(copy):
        assert_outcome(train(copy), "has already trained 1 epoch and 3 steps; give --epochs 2 or more")


# Other runs' checkpoints


@pytest.mark.parametrize("name", ["step-00000009-epoch-003", "step-00000003-epoch-002", "step-99999999-epoch-001"])
def test_a_copy_with_a_later_name_is_set_aside(name: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    shutil.copytree(newest(copy), copy / "checkpoints" / name)
    found = train(copy, epochs=2)
    assert_outcome(found, f"{name} is damaged (it holds step 3 after 1 epochs): set aside as {name}.damaged", code=0)
    assert json.loads((copy / "status.json").read_text())["step"] == 6


def test_an_earlier_checkpoint_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    """The newest is damaged and the previous one is of another run: nothing is trained or renamed."""
    copy, other = copy_of(run, tmp_path / "run"), tmp_path / "other"
    assert train(other, "--seed", 1).code == 0
    last = newest(copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if path != last:
            shutil.rmtree(path)
            shutil.copytree(other / "checkpoints" / path.name, path)
    flip(TENSORS)(last)
    with untouched(copy / "checkpoints"):
        found = train(copy, epochs=2)
    assert_outcome(found, "seed = 0: this run was started with 1", "give another --run_dir", lines=2)


def test_a_checkpoint_that_is_a_link_is_resumed(run: Path, tmp_path: Path) -> None:
    copy, moved = copy_of(run, tmp_path / "run"), tmp_path / "moved"
    last = newest(copy)
    last.rename(moved)
    last.symlink_to(moved)
    with untouched(moved):
        assert_outcome(train(copy, epochs=2), code=0, lines=0)
    assert not last.is_symlink()


@pytest.mark.parametrize("module", ["evaluate", "predict"])
@pytest.mark.parametrize("case", OTHERS)
def test_commands_refuse_a_complete_foreign_checkpoint(
    case: str, module: str, run: Path, image: Path, tmp_path: Path
) -> None:
    change, message = OTHERS[case]
    copy = copy_of(run, tmp_path / "run")
    change(newest(copy))
    update_manifest(newest(copy))
    with untouched(copy / "checkpoints"):
        assert_outcome(inspect(module, copy, image), message, str(newest(copy)))


@pytest.mark.parametrize(
    "values", [{"classes": 5}, {"classes": {}, "normalization": {"mean": 3}}, {"normalization": [1]}], ids=str
)
def test_invalid_metadata_in_a_checkpoint_is_refused(
    values: dict[str, Any], run: Path, image: Path, tmp_path: Path
) -> None:
    copy = copy_of(run, tmp_path / "run")
    in_state(**values)(newest(copy))
    update_manifest(newest(copy))
    with untouched(copy):
        assert_outcome(inspect("predict", copy, image), "normalization or image_size from another version")


# Links and names


@pytest.mark.parametrize("link", ["best", "latest"])
@pytest.mark.parametrize("to", ["nothing", "itself", "..", "/dev/null"])
def test_broken_links_are_ignored(link: str, to: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / "checkpoints" / link).unlink(missing_ok=True)
    (copy / "checkpoints" / link).symlink_to(link if to == "itself" else to)
    with untouched(copy):
        assert_outcome(inspect("predict", copy, image), code=0, lines=0)


def test_a_link_out_of_the_run_is_refused(run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / "checkpoints/best").unlink(missing_ok=True)
    (copy / "checkpoints/best").symlink_to(newest(run))
    assert_outcome(inspect("predict", copy, image), "--checkpoint best: leads to", "name one inside it")


@pytest.mark.parametrize("name", ["", "..", "/etc", "best.pt", "x" * 300, "a\nb"])
@pytest.mark.parametrize("module", ["evaluate", "predict", "export.__main__"])
def test_an_unknown_checkpoint_name_is_refused(name: str, module: str, run: Path, image: Path) -> None:
    arguments = [image] if module == "predict" else []
    with untouched(run):
        assert_outcome(call(module, run, *arguments, "--checkpoint", name), "--checkpoint", "choose one of: ")


@pytest.mark.parametrize("run_name", ["/dev/null", "/etc/passwd", "none", "x" * 300])
@pytest.mark.parametrize("module", ["evaluate", "predict", "export.__main__", "report.__main__", "compare"])
def test_a_folder_that_is_not_a_run_is_refused(run_name: str, module: str, image: Path) -> None:
    arguments = [image] if module == "predict" else ["other"] if module == "compare" else []
    assert_outcome(call(module, run_name, *arguments), f"{run_name}: no config.toml there; RUN is the folder")


# Starting from another run's weights


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "x" * 200])
def test_init_from_a_folder_that_is_not_a_run_is_refused(kind: str, tmp_path: Path) -> None:
    path = {"nothing": tmp_path / "none", "an empty folder": tmp_path / "empty"}.get(kind, kind)
    (tmp_path / "empty").mkdir()
    with untouched(tmp_path):
        assert_outcome(train(tmp_path / "run", "--init_from", path), f"init_from = {path}: no checkpoint there; name")


def _truncated(path: Path) -> None:
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-4])


WEIGHTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty": ("w.safetensors", Path.touch, "not a complete safetensors file, 0 bytes"),
    "text": ("w.safetensors", lambda path: path.write_text("<html>404</html>"), "not a complete safetensors file, 16"),
    "truncated": ("w.safetensors", _truncated, "not a complete safetensors file, 4"),
    "a huge header": ("w", lambda path: path.write_bytes(b"\xff" * 8 + b"{" * 99), "not a complete safetensors file, 107"),
    "a deep header": ("w", lambda path: path.write_bytes((9**5).to_bytes(8, "little") + b"[" * 9**5), "not a complete safe"),
    "no tensors": ("w.safetensors", lambda path: save_file({}, path), "holds no tensors; name another file"),
    "Git LFS": ("w.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
                "a pointer of Git LFS, not the file itself; fetch it with git lfs pull"),
    "torch.save": ("w.pth", lambda path: torch.save({}, path), "is never loaded; convert it once: python -c"),
    "a pickle under another name": ("w.safetensors", lambda path: path.write_bytes(pickle.dumps([])), "is never loaded"),
    "a .ckpt of unknown content": ("w.ckpt", lambda path: path.write_text("x"), "is never loaded; convert it once"),
    "a pipe": ("w.safetensors", os.mkfifo, "not a regular file; name a run, a checkpoint or a .safetensors file"),
    "a link to nothing": ("w.safetensors", lambda path: path.symlink_to("none"), "cannot be read (No such file or directory)"),
    "the null device": ("w.safetensors", lambda path: path.symlink_to("/dev/null"), "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_init_from_a_file_that_holds_no_weights(case: str, tmp_path: Path) -> None:
    name, write, message = WEIGHTS[case]
    write(tmp_path / name)
    with untouched(tmp_path):
        assert_outcome(
            train(tmp_path / "run", "--init_from", tmp_path / name), f"init_from = {tmp_path / name}: ", message
        )


def test_init_from_a_folder_of_other_files(run: Path, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    found = train(tmp_path / "run", "--init_from", tmp_path)
    assert_outcome(found, f"no checkpoint there; name the file, {tmp_path}/model.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "more.safetensors")
    assert_outcome(train(tmp_path / "run", "--init_from", tmp_path), "join its 2 .safetensors files into one")
    found = train(tmp_path / "run", "--init_from", newest(run) / TENSORS)
    assert_outcome(found, f"a part of a checkpoint; name its folder, {newest(run)}")


@pytest.mark.parametrize(
    "case",
    [
        "tensors.safetensors flipped",
        "state.json truncated",
        "tensors.safetensors missing",
        "a state that is a list",
        *OTHERS,
    ],
)
def test_init_from_a_damaged_run_is_refused(case: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (DAMAGES[case] if case in DAMAGES else (OTHERS | STATES)[case][0])(newest(copy))
    if case not in DAMAGES:
        update_manifest(newest(copy))
    with untouched(copy):
        assert_outcome(train(tmp_path / "new", "--init_from", newest(copy)), str(newest(copy)), "; name")


@pytest.mark.parametrize("kind", ["links to nothing", "no links", "links that are folders", "the newest is a copy"])
def test_init_from_a_run_with_broken_links(kind: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    for link in (copy / "checkpoints/latest", copy / "checkpoints/best"):
        link.unlink(missing_ok=True)
        if kind == "links to nothing":
            link.symlink_to("nothing")
        elif kind == "links that are folders":
            link.mkdir()
    if kind == "the newest is a copy":
        shutil.copytree(newest(copy), copy / "checkpoints" / "step-backup")
    with untouched(copy):
        assert_outcome(train(tmp_path / "new", "--init_from", copy), code=0, lines=0)


def test_init_from_a_newer_version_is_refused(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    DAMAGES["a manifest of another format"](newest(copy))
    with untouched(tmp_path):
        assert_outcome(
            train(tmp_path / "new", "--init_from", copy), "written by a newer version of this code, in format 2"
        )


@pytest.mark.parametrize("link", ["latest", "best"])
@pytest.mark.parametrize("module", ["evaluate", "export.__main__"])
def test_links_that_are_folders_are_ignored(link: str, module: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / "checkpoints" / link).unlink(missing_ok=True)
    (copy / "checkpoints" / link).mkdir()
    assert_outcome(inspect(module, copy, image), code=0, lines=0)


def test_links_that_cannot_be_set_do_not_change_the_bits(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    shutil.rmtree(newest(copy))
    (copy / "checkpoints/latest").unlink()
    (copy / "checkpoints/latest/precious").mkdir(parents=True)
    found = train(copy)
    assert_outcome(found, code=0, lines=0)
    assert found.err.count("the link latest was not set") == 1
    assert_same_bits(copy, run)


def test_init_from_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    with untouched(tmp_path, run):
        found = train(tmp_path / "new", "--init_from", run, "--model.name", "cifar_alexnet")
    assert_outcome(found, "holds weights of improved_alexnet, but model.name = cifar_alexnet; name another run")


def test_two_ranks_report_a_checkpoint_that_does_not_fit(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    in_tensors(reshaped)(newest(copy))
    update_manifest(newest(copy))
    arguments = [*SETTINGS, "--run_dir", copy, "--epochs", 2]
    with untouched(copy / "checkpoints"), Command(torchrun(2, *arguments), output=tmp_path / "out") as command:
        assert command.wait(90) == 1  # torchrun's own exit code
    before = command.text.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in before
    assert "the checkpoint does not fit the model: model.fc2.weight" in before
    assert attempts(copy, "failed")[-1]["exit_code"] == 2
    assert status(copy)["status"] == "finished", "what was refused changed nothing"
