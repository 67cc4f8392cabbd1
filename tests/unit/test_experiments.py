"""The table of experiments keeps the rows of runs on other machines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distributed.errors import InputError
from distributed.experiments.results import Result, read_results
from distributed.experiments.table import format_table, read_table, write_table

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


def test_rows_of_other_runs_are_kept(out):
    merged = write_table([OTHER], out)
    assert merged == [FIRST, OTHER]
    assert {name: (row["device"], row["date"], row["versions"]) for name, row in rows(out).items()} == {
        "I-10": ("a CPU", "2026-11-22", {"torch": "2.11.0"}),
        "A-10": ("a GPU", "2026-11-26", {"torch": "2.14.1"}),
    }
    text = out.with_suffix(".md").read_text()
    assert "| I-10 | improved_alexnet" in text
    assert "| A-10 | improved_alexnet" in text


def test_missing_run_folders_do_not_erase_rows(out, tmp_path):
    before = rows(out)
    assert write_table(read_results(tmp_path / "no runs here"), out) == [FIRST]
    assert rows(out) == before


def test_a_table_is_read_back_unchanged(out):
    assert read_table(out.with_suffix(".json")) == [FIRST]


@pytest.mark.parametrize(
    ("epochs", "ended_early", "replaces"),
    [(9, False, False), (10, False, True), (9, True, True), (1, False, False)],
)
def test_a_row_is_replaced_only_by_equal_progress(out, epochs, ended_early, replaces):
    newer = replace(FIRST, epochs=epochs, ended_early=ended_early, device="a GPU", test=85.0)
    write_table([newer], out)
    assert rows(out)["I-10"]["device"] == ("a GPU" if replaces else "a CPU")


def test_an_early_stopped_run_replaces_an_unfinished_one(out):
    write_table([replace(FIRST, name="S1-10", epochs=300, of_epochs=400)], out)
    write_table([replace(FIRST, name="S1-10", epochs=250, of_epochs=400, ended_early=True, device="a GPU")], out)
    assert rows(out)["S1-10"]["device"] == "a GPU"


@pytest.mark.parametrize("content", ["", "{}x", "5", '{"a": 1}', '[{"name": "I-10"}]', "[1]"])
def test_a_file_that_is_not_a_table_is_refused_unchanged(out, content):
    file = out.with_suffix(".json")
    file.write_text(content)
    with pytest.raises(InputError, match="not a table of experiments") as refused:
        write_table([OTHER], out)
    assert len(refused.value.lines) == 1
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("processes", "text"), [("1", "1 process,"), ("2", "2 processes,"), ("1 then 2", "1 then 2 processes,")]
)
def test_the_number_of_processes_is_formatted(processes, text):
    assert f"| a CPU, {text} bfloat16, exact (8) |" in format_table([replace(FIRST, processes=processes)])
