"""The loss, the augmentation and the metric of docs/your-own.md, as printed there, with every command."""

import json
import re
import sys
from pathlib import Path

import pytest
from kit.abuse import assert_outcome, call
from kit.commands import ROOT, Command, assert_same_bits, metrics, torchrun
from kit.own_functions import write_functions
from kit.trained_runs import copy_of, write_test_images

pytestmark = pytest.mark.timeout(300)
PAGE = (ROOT / "docs" / "your-own.md").read_text()
SMALL = ("--data.name", "generated10", "--data.train_samples", 120, "--data.test_samples", 40, "--global_batch_size", 32,
         "--schedule.name", "constant", "--exact.shards", 2, "--device", "cpu", "--threads", 1,
         "--precision", "float32", "--logging.every_steps", 1)  # fmt: skip


def blocks(section: str, language: str) -> list[str]:
    """Return the code blocks of a language in a section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, section
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the modules and the config that the page prints."""
    folder = tmp_path_factory.mktemp("own")
    sections = ("Loss", "Augmentation", "Metrics")
    for code in (code for section in sections for code in blocks(section, "python")):
        name, _, body = code.removeprefix("# ").partition("\n")
        assert len(body.strip().splitlines()) <= 12
        (folder / name).write_text(code)
    (folder / "own.toml").write_text("".join(text for section in sections for text in blocks(section, "toml")))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Two epochs on two processes, without a stop."""
    arguments = ("own.toml", *SMALL, "--epochs", 2, "--run_dir", folder / "run")
    with Command(torchrun(2, *arguments), output=folder / "output", cwd=folder) as command:
        assert command.wait() == 0, command.text
        assert ", brier 0." in command.text
    return folder / "run"


def test_a_resumed_run_on_one_process_has_the_same_bits(folder: Path, run: Path, here: None) -> None:
    for epochs in (1, 2):
        found = call("train", "own.toml", *SMALL, "--epochs", epochs, "--run_dir", folder / "resumed")
        assert found.code == 0, found.err
    assert_same_bits(folder / "resumed", run)
    assert [line["test"] for line in metrics(folder / "resumed") if line["kind"] == "epoch"] == [
        line["test"] for line in metrics(run) if line["kind"] == "epoch"
    ]


def test_other_commands_report_the_metric(run: Path, here: None, tmp_path: Path) -> None:
    logged = metrics(run)[-1]["test"]
    assert logged.keys() == {"loss", "accuracy", "accuracy5", "brier"}
    evaluated = json.loads(call("evaluate", run, "--json", "--checkpoint", "latest").out)
    assert evaluated["metrics"]["brier"] == pytest.approx(logged["brier"], rel=1e-5)
    assert evaluated["loss"] == pytest.approx(logged["loss"], rel=1e-5), "the loss of a test is the user's"
    assert f", brier {logged['brier']:.4f}" in call("evaluate", run, "--checkpoint", "latest").out
    row = next(line for line in call("compare", run, run).out.splitlines() if line.startswith("test brier"))
    assert row.count(f"{logged['brier']:.4f} (epoch 2)") == 2
    reported = call("report", run, "--out", tmp_path / "report.html")
    assert reported.code == 0, reported.out + reported.err
    page = (tmp_path / "report.html").read_text()
    assert "test brier, epoch 2" in page
    assert re.search(r", loss \d\.\d{4}, brier \d\.\d{4}\.", page), "of the best checkpoint"
    assert "could not be created" not in page
    both = call("report", run, run, "--out", tmp_path / "both.html")
    assert both.code == 0, both.out + both.err
    assert "last test brier" in (tmp_path / "both.html").read_text()
    events = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert b"epoch/test_brier" in events


def test_metrics_may_change_when_a_run_resumes(run: Path, here: None, tmp_path: Path) -> None:
    changed = ("--evaluation.metrics", '["own_functions:confidence"]')
    write_functions(Path.cwd())
    copy = copy_of(run, tmp_path / "run")
    found = call("train", "own.toml", *SMALL, *changed, "--epochs", 3, "--run_dir", copy, "--logging.level", "WARNING")
    assert found.code == 0, found.err
    last = metrics(copy)[-1]
    assert (last["epoch"], "confidence" in last["test"], "brier" in last["test"]) == (2, True, False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--loss.options.gamma", 3], "loss.options.gamma = 3: this run was started with 1.5"),
        (["--loss.name", "cross_entropy"], "loss.name = cross_entropy: this run was started with net:focal"),
        (["--data.augment.function", "none"], "data.augment.function = none: this run was started with light:brightn"),
    ],
)
def test_another_function_is_refused(run: Path, here: None, changed: list[object], message: str) -> None:
    found = call("train", "own.toml", *SMALL, *changed, "--epochs", 4, "--run_dir", run)
    assert found.code == 2
    assert message in found.err


def test_elsewhere_the_module_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert_outcome(
        call("evaluate", run), "loss.name = net:focal: there is no module net; run the command in the folder"
    )
    assert "net" not in sys.modules
    exported = call("export", run, "--out", tmp_path / "export")
    assert exported.code == 0, exported.out + exported.err
    [image, *_] = write_test_images(tmp_path / "images", 1)
    assert call("predict", run, image).code == 0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("loss.name", "own_functions:mean", "the function returns a scalar; it should return one loss per sample"),
        ("loss.name", "own_functions:centered", "the result for one sample depends on the others, which exact mode"),
        ("loss.name", "own_functions:focl", "own_functions has no focl; did you mean focal?"),
        ("loss.name", "broken:loss", "broken cannot be imported: ZeroDivisionError: division by zero ("),
        ("data.augment.function", "own_functions:floats", "returns torch.float32 [5, 32, 32, 3] for images of shape"),
        ("data.augment.function", "own_functions:shuffled", "the result for one image depends on the others in the"),
        (
            "evaluation.metrics",
            '["own_functions:fails"]',
            "fails on logits [5, 10] and targets [5]: ValueError: no way (",
        ),
        (
            "evaluation.metrics",
            '["own_functions:noisy"]',
            "draws from torch's generator, which no resumed run could rep",
        ),
    ],
)
def test_a_bad_function_is_one_line(here: None, tmp_path: Path, setting: str, value: str, message: str) -> None:
    write_functions(Path.cwd())
    Path("broken.py").write_text("1 / 0\n")
    found = call("train", *SMALL, f"--{setting}={value}", "--epochs", 1, "--run_dir", tmp_path / "run")
    assert_outcome(found, f"{setting} = {value.strip(chr(34) + '[]')}: ", message)


def test_two_ranks_report_a_bad_function_once(folder: Path, tmp_path: Path) -> None:
    write_functions(folder)
    bad = ("--loss.name", "own_functions:column", "--run_dir", tmp_path / "run")
    with Command(torchrun(2, *SMALL, *bad), output=tmp_path / "output", cwd=folder) as command:
        command.wait()
        errors = [line for line in command.text.splitlines() if " ERROR " in line and "own_functions:column: " in line]
        assert len(errors) == 1, command.text
        assert "loss.name = own_functions:column: the function returns shape [5, 1]" in errors[0]
        assert "exitcode  : 2" in command.text
