import json
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.config import TrainConfig, as_toml
from distributed.errors import InputError
from distributed.figures.style import COLOURS
from distributed.report.comparison import together
from distributed.report.curves import overlaid_curves, run_curves, throughput
from distributed.report.history import History, read_history
from distributed.report.narrative import clock, drops, how_it_ended, how_it_stands, learning_rate, what_it_is
from distributed.report.page import Absent, page, part, pictures, table, text
from distributed.report.run_sections import run_parts

VOID = {"meta", "img", "br", "path", "use", "image", "rect"}


class Checker(HTMLParser):
    """Remembers what stays open and what refers to anything outside of the page."""

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


def assert_stands_alone(document: str) -> None:
    """Every element is closed, and nothing is fetched from anywhere."""
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
         "epochs": 5,
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


def test_attempts_are_told_with_why_they_ended_a_killed_one_too(run: History) -> None:
    assert [how_it_ended(attempt, last=False) for attempt in run.attempts] == [
        "stopped: SIGTERM",
        "killed: no end was written",
        "finished",
    ]
    assert how_it_ended(run.attempts[1], last=True) == "no end was written: it still runs, or was killed"
    assert [attempt.hardware for attempt in run.attempts] == [
        "2 processes × 1 thread, a <processor>",
        "2 processes, a <processor>",
        "1 process",
    ]
    assert run.wall_time == (timedelta(seconds=25), False)


def test_an_attempt_that_failed_before_it_began_is_one_attempt(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    (folder / "attempts.jsonl").write_text(json.dumps(attempt_line("failed", "a", 3, reason="no data")) + "\n")
    [attempt] = read_history(folder).attempts
    assert (attempt.hardware, how_it_ended(attempt, last=True)) == ("ended before it began", "failed: no data")


def test_a_drop_of_the_learning_rate_is_explained_by_the_epochs_before_it(run: History) -> None:
    assert drops(run) == [(4, 0.1, 0.01)]
    assert learning_rate(run) == [
        "The learning rate starts at 0.1 and is multiplied by 0.1 whenever validation accuracy has not improved for 2 "
        "epochs in a row, 3 times at the most.",
        "After epoch 4 it fell from 0.1 to 0.01: the best validation accuracy, 50.00%, was that of epoch 2, 2 epochs before.",
    ]


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "constant"}, "The learning rate stays at 0.1."),
        (
            {"name": "cosine", "warmup_epochs": 2.0},
            "rises linearly to 0.1 over 2 epochs, then falls along half a cosine to 0",
        ),
        ({"name": "one_cycle"}, "rises from 0.004 to 0.1 over the first 25% of all steps, then falls to 1e-05"),
    ],
)
def test_the_other_schedules_are_told_in_a_sentence(tmp_path: Path, schedule: dict[str, Any], said: str) -> None:
    run = read_history(run_of(tmp_path / "run", schedule=schedule))
    assert said in learning_rate(run)[0]


def test_what_the_run_is_and_how_it_stands(run: History) -> None:
    said = what_it_is(run)
    assert "improved_alexnet was trained on the images of cifar10, 20% of them held out" in said
    assert "for 5 of 5 epochs" in said
    assert "best validation accuracy is 50.00%, after epoch 2" in said
    assert "after epoch 5, 35.00% were right" in said
    assert how_it_stands(run) == "The run is finished at step 50."


@pytest.mark.parametrize(
    ("seconds", "said"), [(12, "12 s"), (245, "4 min 05 s"), (3720, "1 h 02 min"), (59.7, "1 min 00 s")]
)
def test_durations(seconds: float, said: str) -> None:
    assert clock(timedelta(seconds=seconds)) == said


def test_texts_cannot_become_markup() -> None:
    made = page(
        "<t>", [part("<h>", text("<p> & more"), table(["<th>"], [["<td>"]]), pictures([(b"png", '"alt"', "")]))]
    )
    assert_stands_alone(made)
    for given in ("<t>", "<h>", "<p> &", "<th>'", "<td>'"):
        assert given not in made.replace("<th>&lt;th&gt;", "").replace("<td>&lt;td&gt;", "")
    assert 'alt="&quot;alt&quot;"' in made


def test_curves_are_drawn_and_stand_alone(run: History) -> None:
    for drawn in (run_curves(run), throughput(run), overlaid_curves([run, run])):
        assert_stands_alone(drawn)
        assert "currentColor" in drawn
    for label in (">train<", ">validation<", ">test<", ">epoch<", ">learning rate<", ">best validation<"):
        assert label in run_curves(run)
    assert ">a new attempt<" in throughput(run)


def test_runs_of_one_epoch_are_drawn_as_points(tmp_path: Path) -> None:
    one_epoch = [train_line(10), epoch_line(0, 0.1, 0.5, 0.4)]
    runs = [read_history(run_of(tmp_path / name, logged=one_epoch)) for name in "ab"]
    drawn = overlaid_curves(runs).partition("<g>")[2]
    for colour in COLOURS[:2]:  # a line of one point is nothing; only points are filled
        assert drawn.count(f"fill: {colour}") >= 3


def test_learning_rates_beyond_the_last_epoch_are_drawn(tmp_path: Path) -> None:
    logged = [train_line(10), epoch_line(0, 0.1, 0.5, 0.4), train_line(20), train_line(30)]
    ticks = run_curves(read_history(run_of(tmp_path / "run", logged=logged))).rpartition("learning rate")[0]
    assert ">3<" in ticks.rpartition("accuracy")[2]


def test_settings_are_spelt_as_in_a_config(tmp_path: Path) -> None:
    runs = [read_history(run_of(tmp_path / name, schedule={"name": name})) for name in ("constant", "plateau")]
    assert "&quot;constant&quot;" in page("runs", together(runs))


def test_a_run_that_has_logged_nothing_is_drawn_nowhere(tmp_path: Path) -> None:
    run = read_history(run_of(tmp_path / "run", logged=[]))
    for draw in (run_curves, throughput, lambda run: overlaid_curves([run])):
        with pytest.raises(Absent, match=r"nothing to draw|no speed is known"):
            draw(run)


@pytest.mark.parametrize("logged", [None, []], ids=["epochs", "no epoch"])
def test_a_page_without_checkpoint_and_data_says_so_in_their_place(
    tmp_path: Path, logged: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A report looks at a run on whatever device there is.
    monkeypatch.setattr("distributed.report.analysis.choose_device", lambda *_: torch.device("cpu"))
    run = read_history(run_of(tmp_path / "a <run>", logged=logged))
    document = page("a page", run_parts(run, checkpoint="auto", anchor="run-0"))
    assert_stands_alone(document)
    assert document.count("This part could not be made.") == (5 if logged is None else 7)
    assert "The run has saved no checkpoint yet" in document
    assert "point --data.root at the folder" in document
    assert "a &lt;processor&gt;" in document


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    a, b = run_of(tmp_path / "a"), run_of(tmp_path / "b", schedule={"name": "constant"})
    save = {"name": "step-00000010-epoch-001", "tensors": {"w": "1"}}
    for folder, digest in ((a, "1"), (b, "2")):
        (folder / "digests.jsonl").write_text(json.dumps(save | {"tensors": {"w": digest}}) + "\n")
    runs = [read_history(a), read_history(b), read_history(a)]
    document = page("runs", together(runs))
    assert_stands_alone(document)
    assert "schedule.name" in document
    assert "a and b are not the same bits (8 logged lines and 1 saved states in common)" in document
    assert "saved after step 10: w" in document
    assert "a and a are the same bits" in document


def test_a_folder_of_no_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.toml there"):
        read_history(tmp_path)
