"""Records of a run folder are read as written; damaged lines and fields are skipped."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest

from distributed.errors import InputError
from distributed.run import records
from distributed.run.metrics_file import EpochRecord, TrainRecord, read_epochs, read_metrics
from distributed.run.records import Status, read_attempts, read_saves

TRAIN = {"kind": "train", "data": "generated10", "epoch": 0, "step": 5, "loss": 2.5, "grad_norm": None}
EPOCH = {"kind": "epoch", "epoch": 0, "step": 10, "train_loss": 2.0, "validation": None, "test": {"accuracy": 0.25}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def write(file: Path, *lines: Any) -> None:
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def test_metrics_are_read_in_order_as_written(file: Path) -> None:
    write(file, TRAIN, EPOCH, TRAIN | {"step": 15})
    assert [record.as_json() for record in read_metrics(file)] == [TRAIN, EPOCH, TRAIN | {"step": 15}]
    (epoch,) = read_epochs(file)
    assert epoch.test is not None
    assert (epoch.test.accuracy, epoch.test.loss, epoch.validation) == (0.25, None, None)


@pytest.mark.parametrize(
    "damaged",
    ['{"kind": "train", "epo', "\0", "[]", "null", "7", {}, {"kind": "other", "epoch": 0, "step": 1},
     {"kind": "train", "epoch": "0", "step": 1}, {"kind": "epoch", "epoch": 0}, "[" * 100_000],
    ids=str,
)  # fmt: skip
def test_damaged_metrics_lines_are_skipped(file: Path, damaged: Any) -> None:
    write(file, TRAIN, damaged, EPOCH)
    assert [record.as_json() for record in read_metrics(file)] == [TRAIN, EPOCH]


def test_damaged_figures_are_none(file: Path) -> None:
    write(file, TRAIN | {"loss": "x", "lr": [1], "data": 5}, EPOCH | {"validation": 3, "test": {"accuracy": "x"}})
    train, epoch = read_metrics(file)
    assert isinstance(train, TrainRecord)
    assert isinstance(epoch, EpochRecord)
    assert (train.loss, train.lr, train.data) == (None, None, None)
    assert epoch.validation is None
    assert epoch.test is not None
    assert epoch.test.accuracy is None


def test_infinite_figures_are_written_as_null() -> None:
    record = TrainRecord(kind="train", epoch=0, step=1, loss=math.inf, grad_norm=-math.inf, lr=0.5)
    assert record.as_json() == {"kind": "train", "epoch": 0, "step": 1, "loss": None, "lr": 0.5, "grad_norm": None}


@pytest.mark.parametrize(
    "damaged",
    [{"event": 1}, {"time": "yesterday"}, {"step": "x"}, {"world_size": 2.5}, {"bits": []}, {"bits": {"versions": 1}},
     {"images": {"train": "x"}}, {"versions": []}],
    ids=str,
)  # fmt: skip
def test_damaged_attempts_are_skipped(file: Path, damaged: dict[str, Any]) -> None:
    line = {"event": "started", "time": "2026-01-01T00:00:00+0000", "step": 0}
    write(file, line, line | damaged, {"event": "lost", "job": "7"})
    assert [record.event for record in read_attempts(file)] == ["started", "lost"]
    assert read_attempts(file)[0].moment.year == 2026


def test_saves_have_names_of_checkpoints(file: Path) -> None:
    write(
        file, {"name": "step-00000010-epoch-001", "tensors": {"a": "1"}}, {"name": "x", "tensors": {}}, {"tensors": {}}
    )
    assert [(record.step, record.tensors) for record in read_saves(file)] == [(10, {"a": "1"})]


@pytest.mark.parametrize("content", [None, "", "[]", '{"status": ["x"], "step": "7"}'])
def test_damaged_status_has_no_fields(file: Path, content: str | None) -> None:
    if content is not None:
        file.write_text(content)
    status = Status.read(file)
    assert (status.status, status.step, status.exit_code) == (None, None, None)


def denied(_: Path) -> NoReturn:
    raise PermissionError(13, "Permission denied")


def test_missing_file_is_empty_and_unreadable_one_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_metrics(file) == read_attempts(file) == read_saves(file) == []
    file.write_text("x")
    monkeypatch.setattr(records, "lines_of", denied)
    with pytest.raises(InputError, match="restore access to it"):
        read_metrics(file)
