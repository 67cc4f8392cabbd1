"""The table of the seeds' experiments: rows of other machines' runs survive."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distributed.errors import InputError
from distributed.experiments.results import Result, read_table, write_results, write_table

FIRST = Result(
    name="I-10", model="improved_alexnet", data="cifar10", epochs=10, of_epochs=10, ended_early=False, at_epoch=10,
    train=84.4, validation=None, test=83.7, test_loss=0.48, minutes=4.2, attempts=1, processes="2", device="a CPU",
    precision="bfloat16", exact_shards=8, versions={"torch": "2.11.0"}, date="2026-11-22",
    command="python -m distributed.experiments --only I-10",
)  # fmt: skip
OTHER = replace(FIRST, name="A-10", device="a GPU", date="2026-11-26", versions={"torch": "2.14.1"})


@pytest.fixture
def out(tmp_path) -> Path:
    write_table([FIRST], tmp_path / "folder" / "table")
    return tmp_path / "folder" / "table"


def rows(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(out.with_suffix(".json").read_text())}


def test_a_later_run_keeps_the_rows_that_it_did_not_run(out):
    merged = write_table([OTHER], out)
    assert merged == [FIRST, OTHER]
    assert {name: (row["device"], row["date"], row["versions"]) for name, row in rows(out).items()} == {
        "I-10": ("a CPU", "2026-11-22", {"torch": "2.11.0"}),
        "A-10": ("a GPU", "2026-11-26", {"torch": "2.14.1"}),
    }
    text = out.with_suffix(".md").read_text()
    assert "| I-10 | improved_alexnet" in text
    assert "| A-10 | improved_alexnet" in text


def test_a_machine_without_those_run_folders_does_not_erase_the_table(out, tmp_path):
    before = rows(out)
    assert write_results(tmp_path / "no runs here", out) == [FIRST]
    assert rows(out) == before


def test_a_run_of_other_machines_is_read_back_as_it_was(out):
    assert read_table(out.with_suffix(".json")) == [FIRST]


@pytest.mark.parametrize(
    ("epochs", "ended_early", "replaces"),
    [(9, False, False), (10, False, True), (9, True, True), (1, False, False)],
)
def test_a_row_is_replaced_only_by_a_run_that_came_as_far(out, epochs, ended_early, replaces):
    newer = replace(FIRST, epochs=epochs, ended_early=ended_early, device="a GPU", test=85.0)
    write_table([newer], out)
    assert rows(out)["I-10"]["device"] == ("a GPU" if replaces else "a CPU")


def test_an_unfinished_run_gives_way_to_one_that_early_stopping_ended_sooner(out):
    write_table([replace(FIRST, name="S1-10", epochs=300, of_epochs=400)], out)
    write_table([replace(FIRST, name="S1-10", epochs=250, of_epochs=400, ended_early=True, device="a GPU")], out)
    assert rows(out)["S1-10"]["device"] == "a GPU"


@pytest.mark.parametrize("content", ["", "{}x", "5", '{"a": 1}', '[{"name": "I-10"}]', "[1]"])
def test_a_file_that_is_no_table_is_refused_and_left_alone(out, content):
    file = out.with_suffix(".json")
    file.write_text(content)
    with pytest.raises(InputError, match="not a table of experiments") as refused:
        write_table([OTHER], out)
    assert len(refused.value.lines) == 1
    assert file.read_text() == content
