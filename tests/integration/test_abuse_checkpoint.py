"""Damaged run folders and checkpoints, each with a name: a clear line, the right exit code, nothing lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from distributed.files import digest_of
from integration.abuse import Outcome, assert_told, call, untouched
from integration.commands import ROOT, Command, assert_same_bits, torchrun
from integration.trained_runs import copy_of, write_test_images

pytestmark = pytest.mark.timeout(200)
SETTINGS = (
    ROOT / "configs/debug.toml", "--data.train_samples", 60, "--data.test_samples", 20, "--global_batch_size", 20,
    "--schedule.name", "constant", "--checkpoint.keep_last", 3, "--checkpoint.every_steps", 1, "--data.validation_fraction",
    0, "--device", "cpu", "--logging.level", "WARNING", "--evaluation.batch_size", 20,
)  # fmt: skip
KINDS = {
    "empty": b"",
    "cut": b'{"status": "fin',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"x"',
    "no UTF-8": b"\xff\xfe\x00\x01",
    "nested without end": b"[" * 5000,
    "an empty object": b"{}",
    "an object of others": b'{"status": 3, "kind": "epoch", "event": [], "name": 1, "step": "x", "time": 0}',
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of three steps, with a checkpoint a step."""
    folder = tmp_path_factory.mktemp("abuse") / "run"
    found = call("train", *SETTINGS, "--run_dir", folder, "--epochs", 1)
    assert found.code == 0, found.err
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_images(tmp_path_factory.mktemp("images") / "new", 1)[0]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????-epoch-???"))


def train(run: Path, *words: object, epochs: int = 1) -> Outcome:
    return call("train", *SETTINGS, "--run_dir", run, "--epochs", epochs, *words)


def look(module: str, run: Path, image: Path) -> Outcome:
    """A command on a run, as short as it goes."""
    words: dict[str, tuple[object, ...]] = {"predict": (image,), "export.__main__": ("--format", "safetensors")}
    return call(module, run, *words.get(module, ()))


def sealed(checkpoint: Path) -> None:
    """A manifest that agrees with the files as they are now; both links lead there."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: list(digest_of(checkpoint / name)) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for link in ("latest", "best"):
        (checkpoint.parent / link).unlink(missing_ok=True)
        (checkpoint.parent / link).symlink_to(checkpoint.name)


# What stands beside the checkpoints

# Two of them at a time would leave nothing to compare.
BESIDE = {
    "all but digests": ["status.json", "attempts.jsonl", "metrics.jsonl", "attempt.json"],
    "digests": ["digests.jsonl"],
}


@pytest.mark.parametrize("files", BESIDE)
@pytest.mark.parametrize("kind", [*KINDS, "a folder", "missing"])
def test_what_is_written_beside_a_run_is_never_needed_to_look_at_it(
    files: str, kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "run"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("step-*", "latest", "best"))
    for file in BESIDE[files]:
        (bare / file).unlink()
        if kind == "a folder":
            (bare / file).mkdir()
        elif kind != "missing":
            (bare / file).write_bytes(KINDS[kind])
    monkeypatch.setattr("distributed.report.run_parts._shown", lambda *_: [])  # slow, and of the data alone
    monkeypatch.setattr("distributed.report.findings.Checked.__init__", lambda *_: None)
    with untouched(run, bare):
        reported = call("report.__main__", bare, run, "--out", tmp_path / "report.html", "--checkpoint", "none")
        assert_told(reported, code=0, lines=0)
        compared = call("compare", bare, run)
        assert_told(compared, code=0, lines=0)
        assert "the same bits" in compared.out


@pytest.mark.parametrize("kind", ["nested without end", "a number", "a folder"])
def test_a_finished_run_whose_status_is_damaged_is_gone_through_and_keeps_its_bits(
    kind: str, run: Path, tmp_path: Path
) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / "status.json").unlink()
    if kind == "a folder":
        (copy / "status.json").mkdir()
        with untouched(copy / "checkpoints"):
            found = train(copy)
        assert_told(found, f"{copy}/status.json: Is a directory", code=4, lines=2 if "ending" in found.err else 1)
        return
    (copy / "status.json").write_bytes(KINDS[kind])
    assert_told(train(copy), code=0, lines=0)
    assert_same_bits(copy, run)


@pytest.mark.parametrize("file", ["attempts.jsonl", "metrics.jsonl", "config.toml"])
def test_a_folder_where_the_run_must_write(file: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / file).unlink()
    (copy / file).mkdir()
    with untouched(copy / "checkpoints"):
        found = train(copy, epochs=2)
    assert_told(found, f"{copy}/{file}: Is a directory", code=4, lines=2 if "ending" in found.err else 1)


@pytest.mark.parametrize("file", ["config.toml"])
@pytest.mark.parametrize(
    "kind", ["missing", "a folder", "cut", "a list", "no UTF-8", "a number", "of another data set"]
)
@pytest.mark.parametrize("module", ["predict", "report.__main__"])
def test_a_damaged_config(file: str, kind: str, module: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / file).unlink()
    if kind == "a folder":
        (copy / file).mkdir()
    elif kind == "of another data set":
        (copy / file).write_text('[data]\nname = "cifar1"')
    elif kind != "missing":
        (copy / file).write_bytes(KINDS[kind])
    with untouched(copy):
        assert_told(
            look(module, copy, image), f"{copy}", ".toml" if kind != "of another data set" else "data.name = cifar1"
        )


# A run folder that is none, or another's


@pytest.mark.parametrize(
    "kind", ["a file", "below a file", "a link to nothing", "a circle", "logs a file", "saves a file"]
)
def test_a_run_folder_that_is_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "a file":
        path.write_text("precious")
    elif kind == "below a file":
        (tmp_path / "text").write_text("precious")
        path = tmp_path / "text" / "run"
    elif kind in ("a link to nothing", "a circle"):
        path.symlink_to(tmp_path / ("nothing" if "nothing" in kind else "run"))
    else:
        path.mkdir()
        (path / ("logs" if "logs" in kind else "checkpoints")).write_text("precious")
    with untouched(tmp_path):
        assert_told(train(path), f"run_dir = {path}: ", "is no folder; move it, or give another with --run_dir")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", 1], "seed = 1: this run was begun with 0"),
        (["--model.name", "cifar_alexnet"], "model.name = cifar_alexnet: this run was begun with improved_alexnet"),
        (["--optim.lr", 0.5], "optim.lr = 0.5: this run was begun with 0.1"),
        (["--exact.shards", 4], "exact.shards = 4: this run was begun with 8"),
    ],
)
def test_a_run_folder_of_another_experiment(words: list[object], said: str, run: Path) -> None:
    with untouched(run):
        assert_told(train(run, *words), said, "give another --run_dir", lines=2)


# Checkpoints that are damaged: a run goes back to the one before; a look at it is refused


def flip(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size - 9)


def emptied(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: os.truncate(checkpoint / name, 0)


def gone(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def swapped(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: shutil.copy(min(checkpoint.parent.glob("step-*")) / name, checkpoint / name)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
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
    **{f"{name} cut": cut(name) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} empty": emptied(name) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} gone": gone(name) for name in (TENSORS, STATE)},
    **{f"{name} of another": swapped(name) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} a folder": replaced(name, Path.mkdir) for name in (TENSORS, STATE, MANIFEST)},
    **{f"{name} a pipe": replaced(name, os.mkfifo) for name in (TENSORS, STATE)},
    f"{TENSORS} a circle": replaced(TENSORS, lambda path: path.symlink_to(path)),
    "a manifest of another format": in_manifest(format=2),
    "a manifest without files": in_manifest(files={}),
    "a manifest with files as a list": in_manifest(files=[]),
    "a manifest with other files": in_manifest(files={"model.pt": [1, "x"]}),
    "a manifest with wrong digests": in_manifest(files={TENSORS: None, STATE: 5}),
}
GONE_ON_WITH = [
    "tensors.safetensors flipped",
    "state.json cut",
    "manifest.json of another",
    "tensors.safetensors a pipe",
]


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_who_looks_at_it(case: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    DAMAGES[case](newest(copy))
    with untouched(copy):
        assert_told(
            look("predict", copy, image),
            str(copy),
            *_said_of(case),
        )


def _said_of(case: str) -> tuple[str, ...]:
    if case == "a manifest of another format":
        return ("written by a newer version",)
    return ("--checkpoint",) if "manifest.json a folder" in case else ("damaged: ", "--checkpoint")


def test_a_run_of_a_newer_version_is_refused_and_not_touched(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        DAMAGES["a manifest of another format"](checkpoint)
    (copy / "status.json").unlink()
    with untouched(copy):
        assert_told(train(copy), "written by a newer version of this code, in format 2 (this one reads up to 1)")


@pytest.mark.parametrize("case", GONE_ON_WITH)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_bits(
    case: str, run: Path, tmp_path: Path
) -> None:
    copy = copy_of(run, tmp_path / "run")
    name = newest(copy).name
    DAMAGES[case](newest(copy))
    (copy / "status.json").unlink()  # else it is finished
    found = train(copy)
    assert_told(found, f"{name} is damaged (", f"set aside as {name}.damaged", code=0)
    shutil.rmtree(copy / "checkpoints" / f"{name}.damaged")
    assert_same_bits(copy, run)


# Checkpoints that are whole by their digests, and not of this run or version


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
    "a tensor too many": (in_tensors(lambda t: t.update({"model.more": t["model.fc3.bias"].clone()})), "more"),
    "a tensor missing": (in_tensors(lambda t: t.pop("model.fc3.bias")), "fc3.bias"),
    "tensors that are none": (
        lambda checkpoint: (checkpoint / TENSORS).write_bytes(b"junk" * 99),
        "tensors.safetensors",
    ),
    "no bytes of tensors": (lambda checkpoint: (checkpoint / TENSORS).write_bytes(b""), "tensors.safetensors"),
}
STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"a state that is {kind}": (as_state(KINDS[kind]), "state") for kind in ("empty", "a list", "nested without end")},
    "counters as a list": (in_state(state=[]), "state in state.json: of another version"),
    "no counters": (in_state(state={}), "state.json is of another version: KeyError: 'epoch'"),
    "a config of a later version": (in_state(config={"lookahead": 3}), "a config that this version cannot read ("),
}  # fmt: skip


@pytest.mark.parametrize("case", [*OTHERS, *STATES])
def test_a_whole_checkpoint_of_something_else_is_not_gone_on_with(case: str, run: Path, tmp_path: Path) -> None:
    change, said = (OTHERS | STATES)[case]
    copy = copy_of(run, tmp_path / "run")
    change(newest(copy))
    sealed(newest(copy))
    with untouched(copy / "checkpoints"):
        found = train(copy, epochs=2)
    assert_told(found, said, str(copy), "give another --run_dir")


@pytest.mark.parametrize("module", ["evaluate", "predict"])
@pytest.mark.parametrize("case", OTHERS)
def test_a_whole_checkpoint_of_something_else_is_refused(
    case: str, module: str, run: Path, image: Path, tmp_path: Path
) -> None:
    change, said = OTHERS[case]
    copy = copy_of(run, tmp_path / "run")
    change(newest(copy))
    sealed(newest(copy))
    with untouched(copy / "checkpoints"):
        assert_told(look(module, copy, image), said, str(newest(copy)))


@pytest.mark.parametrize(
    "values", [{"classes": 5}, {"classes": {}, "normalization": {"mean": 3}}, {"normalization": [1]}], ids=str
)
def test_odd_facts_in_a_checkpoint(values: dict[str, Any], run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    in_state(**values)(newest(copy))
    sealed(newest(copy))
    with untouched(copy):
        assert_told(look("predict", copy, image), "state.json: its classes or normalization are of another version")


# Links and names


@pytest.mark.parametrize("link", ["best", "latest"])
@pytest.mark.parametrize("to", ["nothing", "itself", "..", "/dev/null"])
def test_broken_links_are_passed_over(link: str, to: str, run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / "checkpoints" / link).unlink(missing_ok=True)
    (copy / "checkpoints" / link).symlink_to(link if to == "itself" else to)
    with untouched(copy):
        assert_told(look("predict", copy, image), code=0, lines=0)


def test_a_link_out_of_the_run(run: Path, image: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (copy / "checkpoints/best").unlink(missing_ok=True)
    (copy / "checkpoints/best").symlink_to(newest(run))
    assert_told(look("predict", copy, image), "--checkpoint best: leads to", "name one that lies in it")


@pytest.mark.parametrize("name", ["", "..", "/etc", "best.pt", "x" * 300, "a\nb"])
@pytest.mark.parametrize("module", ["evaluate", "predict", "export.__main__"])
def test_a_checkpoint_name_that_is_none(name: str, module: str, run: Path, image: Path) -> None:
    words = [image] if module == "predict" else []
    with untouched(run):
        assert_told(call(module, run, *words, "--checkpoint", name), "--checkpoint", "there are: ")


@pytest.mark.parametrize("run_name", ["/dev/null", "/etc/passwd", "none", "x" * 300])
@pytest.mark.parametrize("module", ["evaluate", "predict", "export.__main__", "report.__main__", "compare"])
def test_a_run_that_is_none(run_name: str, module: str, image: Path) -> None:
    words = [image] if module == "predict" else ["other"] if module == "compare" else []
    assert_told(call(module, run_name, *words), f"{run_name}: no config.toml there; RUN is the folder")


# Starting from another run's weights


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty folder", "/dev/null", "x" * 200])
def test_weights_from_what_is_no_run(kind: str, tmp_path: Path) -> None:
    path = {"nothing": tmp_path / "none", "a file": tmp_path / "file", "an empty folder": tmp_path / "empty"}.get(
        kind, kind
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with untouched(tmp_path):
        assert_told(train(tmp_path / "run", "--init_from", path), f"init_from = {path}: no checkpoint there; name")


@pytest.mark.parametrize(
    "case",
    ["tensors.safetensors flipped", "state.json cut", "tensors.safetensors gone", "a state that is a list", *OTHERS],
)
def test_weights_of_a_damaged_run(case: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    (DAMAGES[case] if case in DAMAGES else (OTHERS | STATES)[case][0])(newest(copy))
    if case not in DAMAGES:
        sealed(newest(copy))
    with untouched(copy):
        assert_told(train(tmp_path / "new", "--init_from", newest(copy)), str(newest(copy)), "; name")


def test_weights_of_another_model(run: Path, tmp_path: Path) -> None:
    with untouched(tmp_path, run):
        found = train(tmp_path / "new", "--init_from", run, "--model.name", "cifar_alexnet")
    assert_told(found, "holds weights of improved_alexnet, and model.name = cifar_alexnet; name another run")


def test_a_run_that_cannot_go_on_is_told_by_two_ranks_too(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    in_tensors(reshaped)(newest(copy))
    sealed(newest(copy))
    words = [*SETTINGS, "--run_dir", copy, "--epochs", 2]
    with untouched(copy / "checkpoints"), Command(torchrun(2, *words), output=tmp_path / "out") as command:
        assert command.wait(90) == 1  # torchrun's own
    before = command.text.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in before
    assert "the checkpoint does not fit the model: model.fc2.weight" in before
    assert json.loads((copy / "status.json").read_text())["exit_code"] == 2
