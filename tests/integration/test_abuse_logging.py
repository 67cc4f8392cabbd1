"""Sinks of the user's that are missing, wrong or fail, and services that are not installed or not logged in."""

import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.abuse import Outcome, assert_outcome, call
from kit.commands import ROOT, status
from kit.user_modules import started_in

SETTINGS = (
    ROOT / "configs/debug.toml", "--data.train_samples", 60, "--data.test_samples", 20, "--global_batch_size", 20,
    "--schedule.name", "constant", "--data.validation_fraction", 0, "--device", "cpu", "--logging.level", "WARNING",
    "--evaluation.batch_size", 20, "--logging.every_steps", 1, "--evaluation.test_every_epoch", "false", "--epochs", 1,
    "--threads", 1,
)  # fmt: skip
SINKS = """\
import json


class Lines:
    def __init__(self, config, run_dir):
        self.lines = [("made", config.epochs, run_dir.name)]
        self.file = run_dir / "own.json"

    def begin(self, step):
        self.lines.append(("begin", step))

    def log_step(self, metrics):
        self.lines.append(("step", metrics.step))

    def log_epoch(self, metrics):
        self.lines.append(("epoch", metrics.epoch))

    def end(self, status):
        self.lines.append(("end", status))

    def close(self):
        self.file.write_text(json.dumps(self.lines))


class Short:
    def __init__(self, config, run_dir):
        pass

    def log_step(self, metrics):
        pass

    def close(self):
        pass


class NoArguments(Lines):
    def __init__(self):
        pass


class CannotConnect(Lines):
    def __init__(self, config, run_dir):
        connect(config)


def connect(config):
    raise ConnectionError("no answer from\\nchat.example")  # LAST


class Exits(Lines):
    def __init__(self, config, run_dir):
        raise SystemExit(0)


class FailsInStep(Lines):
    def log_step(self, metrics):
        self.lines.append(("step", metrics.step))
        raise ValueError("full")


class FailsInBegin(Lines):
    def begin(self, step):
        raise ValueError("full")


class FailsAtEnd(Lines):
    def end(self, status):
        raise ValueError("full")


class FailsToClose(Lines):
    def close(self):
        raise ValueError("full")


number = 3
"""
LAST = SINKS[: SINKS.index("# LAST")].count("\n") + 1


@pytest.fixture(autouse=True)
def module(tmp_path: Path) -> Iterator[None]:
    """The sinks in own_sinks.py, in the folder where the command runs."""
    (tmp_path / "own_sinks.py").write_text(SINKS)
    (tmp_path / "broken_sinks.py").write_text("def")
    (tmp_path / "raises_sinks.py").write_text("\n1 / 0\n")
    with started_in(tmp_path):
        yield


def train(run: Path, *sinks: str, more: tuple[object, ...] = ()) -> Outcome:
    return call("train", *SETTINGS, "--run_dir", run, "--logging.sinks", json.dumps(sinks), *more)


BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such module": ("own_sink:Lines", ("there is no module own_sink; did you mean own_sinks?",)),
    "no such module in a package": ("json.sinks:Lines", ("there is no module json.sinks",)),
    "no such class": ("own_sinks:Line", ("own_sinks has no Line; did you mean Lines?",)),
    "nothing like it": ("own_sinks:Zq", ("own_sinks has no Zq; name a function or class that is defined there",)),
    "a number": ("own_sinks:number", ("own_sinks.number is of type int; name a function or class",)),
    "a module that does not parse": ("broken_sinks:A", ("broken_sinks cannot be imported: SyntaxError", "broken_sinks.py:1")),
    "a module that raises": ("raises_sinks:A", ("cannot be imported: ZeroDivisionError", "raises_sinks.py:2)")),
    "a method is missing": ("own_sinks:Short", ("Short has no method log_epoch; a sink has log_step, log_epoch, close",)),
    "other arguments": ("own_sinks:NoArguments", ("the class does not accept config, which every sink gets",)),
    "an error in the constructor": (
        "own_sinks:CannotConnect",
        ("failed: ConnectionError: no answer from chat.example", f"own_sinks.py:{LAST})"),
    ),
    "an exit in the constructor": ("own_sinks:Exits", ("the class failed: SystemExit: 0",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sink_is_refused_before_training(case: str, tmp_path: Path) -> None:
    path, parts = BAD[case]
    found = train(tmp_path / "run", path)
    assert_outcome(found, f"logging.sinks = {path}: ", *parts)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_sink_learns_start_and_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = train(run, "own_sinks:Lines")
    assert (found.code, found.errors) == (0, []), found.err
    assert json.loads((run / "own.json").read_text()) == [
        ["made", 1, "run"], ["begin", 0], ["step", 1], ["step", 2], ["step", 3], ["epoch", 0], ["end", "finished"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["FailsInStep", "FailsInBegin", "FailsAtEnd", "FailsToClose"])
def test_a_failing_sink_is_one_warning(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = train(run, f"own_sinks:{name}", "own_sinks:Lines")
    assert (found.code, found.errors) == (0, []), found.err
    warnings = [line for line in found.err.splitlines() if f"own_sinks:{name}" in line]
    assert len(warnings) == 1, found.err
    assert warnings[0].endswith(f"own_sinks:{name}: ValueError: full; continuing without it")
    assert len(json.loads((run / "own.json").read_text())) == 7  # the other sink has everything
    assert status(run)["status"] == "finished"


@pytest.mark.parametrize(
    ("setting", "value", "package"),
    [
        ("logging.wandb.mode", "offline", "wandb"),
        ("logging.mlflow.experiment", "x", "mlflow-skinny"),
        ("logging.mlflow.tracking_uri", "sqlite:///x.db", "sqlalchemy"),
    ],
)
def test_a_missing_package_is_named(setting: str, value: str, package: str, monkeypatch, tmp_path: Path) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return {"mlflow-skinny": "3.17"}.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    found = call("train", *SETTINGS, "--run_dir", tmp_path / "run", f"--{setting}", value)
    assert_outcome(found, f"needs the package {package}: pip install '{package}>=")
    assert not (tmp_path / "run").exists()


def test_wandb_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.teardown()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = call(
        "train", *SETTINGS, "--run_dir", tmp_path / "run", "--logging.wandb.project", "x",
        HOME=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path), WANDB_API_KEY="", WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert_outcome(found, "logging.wandb.mode = online needs an API key: run `wandb login`, set WANDB_API_KEY, or set")
    assert not re.search(r"metrics\.jsonl", str(list((tmp_path / "run").rglob("*"))))
