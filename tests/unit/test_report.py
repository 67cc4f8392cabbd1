import json
import os
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distributed.config import TrainConfig, as_toml, load_config
from distributed.errors import InputError
from distributed.figures.curves import NamedLog, overlaid_curves
from distributed.figures.style import COLOURS, as_png
from distributed.recipe import train
from distributed.report import comparison
from distributed.report.__main__ import main as report
from distributed.report.comparison import comparison_sections
from distributed.report.history import History, WallTime, read_history
from distributed.report.narrative import clock, describe, describe_end, describe_learning_rate, describe_status
from distributed.report.page import Absent, Picture, page, pictures, section, table, text
from distributed.report.run_sections import _speed, curves_as_svg, run_sections, speed_as_svg
from distributed.run.metrics_log import LrDrop

VOID = {"meta", "img", "br", "path", "use", "image", "rect"}


class Checker(HTMLParser):
    """Collects elements left open and references to anything outside the page."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            refers = name in ("src", "href", "xlink:href", "action", "data")
            if (refers and not (value or "").startswith(("data:image/png;base64,", "#"))) or tag in ("script", "link"):
                self.outside.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def assert_self_contained(document: str) -> None:
    """Assert that every element is closed and nothing is loaded from outside."""
    checker = Checker(document)
    assert (checker.open, checker.outside) == ([], [])
    assert "@import" not in document
    assert "url(http" not in document


def epoch_line(epoch: int, lr: float, validation: float, test: float) -> dict[str, Any]:
    splits = {name: {"loss": 1 - value, "accuracy": value, "accuracy5": 1.0} for name, value in
              (("validation", validation), ("test", test))}  # fmt: skip
    return {"kind": "epoch", "epoch": epoch, "step": 10 * (epoch + 1), "lr": lr, "train_loss": 1 / (epoch + 1),
            "train_accuracy": 0.5, "seconds": 3.0, **splits}  # fmt: skip


def train_line(step: int) -> dict[str, Any]:
    return {"kind": "train", "epoch": 0, "step": step, "loss": 1.0, "lr": 0.1, "images_per_second": 100.0 + step,
            "data_wait": 0.02}  # fmt: skip


def attempt_line(event: str, token: str, second: int, **facts: Any) -> dict[str, Any]:
    return {
        "event": event,
        "token": token,
        "time": f"2026-01-02T03:04:{second:02}+0000",
        "world_size": 2,
        "step": 0,
    } | facts


def run_of(folder: Path, *, schedule: dict[str, Any] | None = None, logged: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    config = TrainConfig.model_validate(
        {"run_dir": folder, "schedule": schedule or {"name": "plateau", "patience": 1}, "optim": {"name": "sgd", "lr": 0.1},
         "epochs": 5, "precision": "bfloat16",
         "data": {"name": "cifar10", "root": folder / "no data"}}
    )  # fmt: skip
    (folder / "config.toml").write_text(as_toml(config))
    accuracies, rates = [0.3, 0.5, 0.4, 0.5, 0.45], [0.1, 0.1, 0.1, 0.1, 0.01]
    lines = logged if logged is not None else [
        *map(train_line, (5, 10, 20)),
        *(epoch_line(e, lr, a, a - 0.1) for e, (lr, a) in enumerate(zip(rates, accuracies, strict=True))),
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    attempts = [
        attempt_line("started", "a", 0, bits={"device": "a <processor>", "threads": 1}),
        attempt_line("stopped", "a", 10, reason="SIGTERM"),
        attempt_line("started", "b", 20, step=12, bits={"device": "a <processor>"}),
        attempt_line("started", "c", 30, step=20, world_size=1, bits={}),
        attempt_line("finished", "c", 45, reason=""),
    ]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    (folder / "status.json").write_text(json.dumps({"status": "finished", "step": 50}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> History:
    return read_history(run_of(tmp_path / "a <run>"))


def test_attempts_say_why_they_ended(run: History) -> None:
    assert [describe_end(attempt, last=False) for attempt in run.attempts] == [
        "stopped: SIGTERM",
        "killed: no end recorded",
        "finished",
    ]
    assert describe_end(run.attempts[1], last=True) == "no end recorded: still running, or killed"
    assert [attempt.hardware for attempt in run.attempts] == [
        "2 processes × 1 thread, a <processor>",
        "2 processes, a <processor>",
        "1 process",
    ]
    assert run.wall_time == WallTime(timedelta(seconds=25), complete=False)


def test_a_refused_attempt_did_not_train(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(attempt_line("failed", "d", 50, reason="other images")) + "\n")
    run = read_history(folder)
    assert "Hardware: 1 process." in describe(run)
    assert [attempt.started.step for attempt in run.started_attempts] == [0, 12, 20]


def test_the_trainers_own_end_counts(tmp_path: Path) -> None:
    """Slurm may kill the batch script after the trainer has stopped; the requeued job records it as lost."""
    folder = run_of(tmp_path / "run")
    lines = [attempt_line("started", "a", 0), attempt_line("stopped", "a", 30), attempt_line("lost", "a", 50)]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [attempt] = read_history(folder).attempts
    assert attempt.ended is not None
    assert (attempt.ended.event, attempt.duration) == ("stopped", timedelta(seconds=30))


def test_an_attempt_that_failed_early_is_one_attempt(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    (folder / "attempts.jsonl").write_text(json.dumps(attempt_line("failed", "a", 3, reason="no data")) + "\n")
    [attempt] = read_history(folder).attempts
    assert (attempt.hardware, describe_end(attempt, last=True)) == ("ended before training started", "failed: no data")


def test_a_drop_of_the_learning_rate_is_explained(run: History) -> None:
    assert run.log.lr_drops() == [LrDrop(epoch=4, before=0.1, after=0.01)]
    assert describe_learning_rate(run) == [
        "The learning rate starts at 0.1 and is multiplied by 0.1 whenever validation accuracy has not improved for 2 "
        "epochs in a row, at most 3 times.",
        "After epoch 4 it dropped from 0.1 to 0.01: the best validation accuracy, 50.00%, was reached 2 epochs earlier, in "
        "epoch 2.",
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant"}, "The learning rate is constant at 0.1."),
        (
            {"name": "cosine", "warmup_epochs": 2.0},
            "rises linearly to 0.1 over 2 epochs, then follows a cosine down to 0",
        ),
        ({"name": "one_cycle"}, "rises from 0.004 to 0.1 over the first 25% of all steps, then falls to 1e-05"),
    ],
)
def test_other_schedules_are_described_in_a_sentence(tmp_path: Path, schedule: dict[str, Any], expected: str) -> None:
    run = read_history(run_of(tmp_path / "run", schedule=schedule))
    assert expected in describe_learning_rate(run)[0]


def test_a_run_is_described_in_sentences(run: History) -> None:
    assert describe(run) == (
        "improved_alexnet on CIFAR-10: 5 of 5 epochs, batch size 128, optimizer sgd, peak learning rate 0.1, precision "
        "bfloat16. 20% of the training images are held out for validation. Hardware: 1 process. "
        "Best validation accuracy: 50.00% (epoch 2). Last test accuracy: 35.00% (epoch 5)."
    )
    assert describe_status(run) == "The run finished at step 50."


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"status": "running", "step": 450, "saved_step": 400}, "newest checkpoint is of step 400."),
        ({"status": "running", "step": 0}, "newest checkpoint has not been written yet."),
        (
            {"status": "failed", "step": 7, "exit_code": 1, "reason": "a bug"},
            "step 7: a bug. The same command resumes it",
        ),
        (
            {"status": "failed", "exit_code": 3},
            "The same command would fail again: first change what the message names.",
        ),
    ],
)
def test_a_run_that_did_not_finish_says_what_is_left(tmp_path: Path, status: dict[str, Any], expected: str) -> None:
    folder = run_of(tmp_path / "run")
    (folder / "status.json").write_text(json.dumps(status))
    assert expected in describe_status(read_history(folder))


def test_a_run_resumed_from_a_store_has_all_its_epochs(tmp_path: Path) -> None:
    """It logs only the epochs since the resume."""
    folder = run_of(tmp_path / "run", logged=[epoch_line(epoch, 0.1, 0.3, 0.2) for epoch in (3, 4)])
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(f"{config}\n[early_stopping]\npatience = 3\n")
    history = read_history(folder)
    assert history.progress == "5 of 5 epochs"
    assert describe_status(history) == "The run finished at step 50."


@pytest.mark.parametrize(
    ("seconds", "expected"), [(12, "12 s"), (245, "4 min 05 s"), (3720, "1 h 02 min"), (59.7, "1 min 00 s")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert clock(timedelta(seconds=seconds)) == expected


def test_text_cannot_become_markup() -> None:
    made = page(
        "<t>", [section("<h>", text("<p> & more"), table(["<th>"], [["<td>"]]), pictures([Picture(b"png", '"alt"')]))]
    )
    assert_self_contained(made)
    for given in ("<t>", "<h>", "<p> &", "<th>'", "<td>'"):
        assert given not in made.replace("<th>&lt;th&gt;", "").replace("<td>&lt;td&gt;", "")
    assert 'alt="&quot;alt&quot;"' in made


def test_curves_are_self_contained(run: History) -> None:
    for drawn in (curves_as_svg(run), speed_as_svg(run), comparison.curves_as_svg([run, run])):
        assert_self_contained(drawn)
        assert "currentColor" in drawn
        assert "mathdefault" not in drawn
    for label in (">train<", ">validation<", ">test<", ">epoch<", ">learning rate<", ">best validation<"):
        assert label in curves_as_svg(run)
    assert ">new attempt<" in speed_as_svg(run)


def test_runs_of_one_epoch_are_drawn_as_points(tmp_path: Path) -> None:
    one_epoch = [train_line(10), epoch_line(0, 0.1, 0.5, 0.4)]
    runs = [read_history(run_of(tmp_path / name, logged=one_epoch)) for name in "ab"]
    drawn = comparison.curves_as_svg(runs).partition("<g>")[2]
    for colour in COLOURS[:2]:  # a line of one point is nothing; only points are filled
        assert drawn.count(f"fill: {colour}") >= 3


def test_curves_of_many_trials_keep_their_height(tmp_path: Path) -> None:
    """Sixty long names would leave no room for the curves of a page of fixed size."""
    log = read_history(run_of(tmp_path / "run")).log
    runs = [NamedLog(f"{place:02}" + 58 * "x", log) for place in range(60)]
    with overlaid_curves(runs, split="validation") as drawn:
        as_png(drawn)  # computes the layout
        inches = [axes.get_position().height * drawn.get_figheight() for axes in drawn.axes]
    assert min(inches) > 2


def test_learning_rates_beyond_the_last_epoch_are_drawn(tmp_path: Path) -> None:
    logged = [train_line(10), epoch_line(0, 0.1, 0.5, 0.4), train_line(20), train_line(30)]
    ticks = curves_as_svg(read_history(run_of(tmp_path / "run", logged=logged))).rpartition("learning rate")[0]
    assert ">3<" in ticks.rpartition("accuracy")[2]


def test_settings_are_written_as_in_a_config_file(tmp_path: Path) -> None:
    runs = [read_history(run_of(tmp_path / name, schedule={"name": name})) for name in ("constant", "plateau")]
    assert "&quot;constant&quot;" in page("runs", comparison_sections(runs))


def test_a_run_that_logged_nothing_has_no_curves(tmp_path: Path) -> None:
    run = read_history(run_of(tmp_path / "run", logged=[]))
    for draw in (curves_as_svg, _speed, lambda run: comparison.curves_as_svg([run])):
        with pytest.raises(Absent, match=r"nothing to draw|the speed is unknown"):
            draw(run)


@pytest.mark.parametrize("logged", [None, []], ids=["epochs", "no epoch"])
def test_a_page_without_checkpoint_and_data_says_so(
    tmp_path: Path, logged: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A report looks at a run on whatever device there is.
    monkeypatch.setattr("distributed.report.analysis.choose_device", lambda *_: torch.device("cpu"))
    run = read_history(run_of(tmp_path / "a <run>", logged=logged))
    document = page("a page", run_sections(run, checkpoint="auto", anchor="run-0"))
    assert_self_contained(document)
    assert document.count("This section could not be created.") == (5 if logged is None else 7)
    assert "The run has not saved a checkpoint yet" in document
    assert "point --data.root at the folder" in document
    assert "a &lt;processor&gt;" in document


@pytest.mark.usefixtures("restore_threads_and_log")
def test_a_class_folder_that_is_not_utf8_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an archive made on an old Windows."""
    for split, count in (("train", 4), ("test", 2)):
        for name in (os.fsdecode(b"caf\xe9"), "tea"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (40 * number, 9, 9)).save(folder / f"{number}.png")
    data = {"name": "image_folder", "root": tmp_path / "data", "validation_fraction": 0.0}
    settings = {"epochs": 1, "global_batch_size": 8, "optim": {"lr": 0.01}, "precision": "float32", "device": "cpu"}
    train(load_config(run_dir=tmp_path / "run", data=data, exact={"shards": 0}, threads=1, **settings))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    assert report() == 0
    assert b"caf\\udce9" in (tmp_path / "page.html").read_bytes()


def test_several_runs_are_compared(tmp_path: Path) -> None:
    a, b = run_of(tmp_path / "a"), run_of(tmp_path / "b", schedule={"name": "constant"})
    save = {"name": "step-00000010-epoch-001", "tensors": {"w": "1"}}
    for folder, digest in ((a, "1"), (b, "2")):
        (folder / "digests.jsonl").write_text(json.dumps(save | {"tensors": {"w": digest}}) + "\n")
    runs = [read_history(a), read_history(b), read_history(a)]
    document = page("runs", comparison_sections(runs))
    assert_self_contained(document)
    assert "schedule.name" in document
    assert "a and b are not bit-identical (8 logged lines and 1 saved state in common)" in document
    assert "saved after step 10: w" in document
    assert "a and a are bit-identical" in document


def test_a_folder_without_a_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.toml there"):
        read_history(tmp_path)
