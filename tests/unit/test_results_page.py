"""docs/results.md is what `python -m distributed.experiments page` writes."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kit.results import CPU, GPU, curve_of, result_of
from PIL import Image

from distributed.documents.blocks import with_blocks
from distributed.errors import InputError
from distributed.experiments.catalogue import ABLATIONS, CATALOGUE, RECIPES, Ablation
from distributed.experiments.page import BLOCKS, write_page
from distributed.experiments.page_blocks import ablations, alternatives, curves, recipes, references_cpu, references_gpu
from distributed.experiments.pictures import pictures
from distributed.experiments.records import read_results, write_results
from distributed.experiments.result import Result

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "results"
BASE = "cifar10_fast-base"


def rows_of(block: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows, by the first one without its link."""
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line.startswith("|")]
    return {name.partition("](")[0].strip("[`"): cells for name, *cells in table}


def test_the_page_has_the_figures_of_the_results():
    assert with_blocks(PAGE.read_text(), BLOCKS, read_results(RESULTS / "results.json")) == PAGE.read_text()


def test_the_pictures_show_the_curves_of_the_results():
    expected = {picture.name: picture.description for picture in pictures(read_results(RESULTS / "results.json"))}
    drawn = {}
    for file in RESULTS.glob("curves_*.png"):
        with Image.open(file) as image:
            drawn[file.name] = image.info["Description"]
    assert drawn == expected


def test_a_new_result_changes_the_page_and_its_picture(tmp_path):
    for folder in ("docs", "results"):
        (tmp_path / folder).mkdir()
    shutil.copy(PAGE, tmp_path / "docs")
    file = tmp_path / "results" / "results.json"
    write_results([result_of("cifar10_fast", test=12.34, curve=curve_of(10.0, 12.34))], file)
    picture, page = write_page(tmp_path)
    assert "| [`cifar10_fast`](../configs/cifar10_fast.toml) |" in page.read_text()
    assert "| 12.34 % | 0: 12.34 |" in page.read_text()
    with Image.open(picture) as image:
        first, width = image.info["Description"], image.width
    assert width > 500
    write_results([result_of("cifar10_fast", test=12.35, curve=curve_of(10.0, 12.35))], file)
    write_page(tmp_path)
    with Image.open(picture) as image:
        assert image.info["Description"] != first


def test_mean_and_deviation_are_over_complete_seeds():
    runs = [
        result_of("cifar10_fast", seed=0, test=94.0, minutes=10.0),
        result_of("cifar10_fast", seed=1, test=94.4, minutes=12.0),
        result_of("cifar10_fast", seed=2, test=50.0, minutes=1.0, epochs=3, of_epochs=16),
    ]
    row = rows_of(recipes(runs))["cifar10_fast"]
    assert row[2] == "94.20 ± 0.28 %"
    assert row[3] == "0: 94.00, 1: 94.40, 2: 50.00 after 3 epochs"
    assert row[5] == "11.0"
    assert rows_of(recipes(runs[:1]))["cifar10_fast"][2] == "94.00 %"
    assert rows_of(recipes(runs[2:]))["cifar10_fast"][2] == "-"


def test_minutes_in_other_precisions_are_means_of_their_own():
    modes = [("bfloat16", 20.0), ("bfloat16", 22.0), ("float32", 70.0)]
    runs = [
        result_of("cifar10_fast", seed=seed, precision=precision, minutes=minutes, processes="1")
        for seed, (precision, minutes) in enumerate(modes)
    ]
    row = rows_of(recipes(runs))["cifar10_fast"]
    assert row[5] == "21.0; 70.0"
    assert row[6] == "a CPU, 1 process, bfloat16, exact (8); 1 process, float32, exact (8)"


def test_runs_with_other_settings_are_not_on_the_page():
    other = result_of("cifar10_fast", settings=("--precision=float32",), curve=curve_of(90.0))
    assert recipes([other]) == recipes([])
    assert curves([other]) == curves([])
    assert recipes([result_of("cifar10_fast", epochs=22)]) == recipes([])  # of an earlier version of the config
    shorter = result_of(BASE, validation=91.0, settings=("--epochs=1",))
    assert ablations([shorter]) == ablations([])
    other_optimizer = result_of("cifar10_fast-sgd", validation=91.0, settings=("--optim.name=adamw",))
    assert alternatives([other_optimizer]) == alternatives([])


def test_a_recipe_has_a_row_per_kind_of_device():
    runs = [result_of("improved_10"), result_of("improved_10", machine=GPU, test=80.0)]
    lines = [line for line in recipes(runs).splitlines() if line.startswith("|")][2:]
    assert len(lines) == len(RECIPES) + 1
    assert sum("not yet run" in line for line in lines) == len(RECIPES) - 1
    assert [("a CPU" in line, "a GPU" in line) for line in lines if "`improved_10`" in line] == [
        (True, False),
        (False, True),
    ]


def test_lines_outside_tables_are_at_most_100_wide():
    machine = GPU | {"device": "a card with the longest name that anyone has ever given to a card"}
    runs = [
        result_of(id, machine=each, validation=90.0, versions={"torch": version}, date=f"2026-11-2{number}")
        for id in CATALOGUE
        for number, (each, version) in enumerate([(CPU, "2.15.0"), (machine, "2.11.0+cu130")])
    ]
    lines = [line for block in BLOCKS.values() for line in block(runs).splitlines()]
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_references_are_shown_per_kind_of_device():
    runs = [
        result_of("I-10", test=83.5),
        result_of("I-10", test=84.5, machine=GPU),
        result_of("S1-10", validation=58.5, test=57.9, epochs=3, of_epochs=400),
    ]
    rows = rows_of(references_cpu(runs))
    assert rows["I-10"][2:5] == ["-", "83.50 %", "-, 79.46 %"]
    assert rows["S1-10"][1:4] == ["3 of 400", "58.50 % at epoch 3", "57.90 %"]
    assert rows["A-10"][1] == "not yet run"
    rows = rows_of(references_gpu(runs))
    assert rows["I-10"][3] == "84.50 %"
    assert rows["S1-10"][1] == "not yet run"


def changes(*, alternative: bool) -> list[Ablation]:
    return [each for each in ABLATIONS if each.base == BASE and each.id != BASE and each.alternative == alternative]


@pytest.mark.parametrize(("block", "alternative"), [(ablations, False), (alternatives, True)])
def test_a_change_is_compared_with_its_base(block: Callable[[Sequence[Result]], str], alternative: bool) -> None:
    better, worse, same = changes(alternative=alternative)[:3]
    runs = [
        result_of(BASE, validation=91.0),
        result_of(better.id, validation=91.25),
        result_of(worse.id, validation=89.5),
        result_of(same.id, validation=90.999),
        *[result_of(each.id, validation=80.0) for each in changes(alternative=not alternative)],
    ]
    rows = rows_of(block(runs))
    assert [rows[each.change][3] for each in (better, worse, same)] == ["+0.25", "-1.50", "+0.00"]
    assert rows.get("base", [""] * 4)[3] == ""
    assert ("base" in rows) != alternative
    assert len(rows) == 2 + len(changes(alternative=alternative)) + (not alternative)  # with the header and its line
    others = set(rows) - {"change", "base", better.change, worse.change, same.change}
    assert {rows[other][1] for other in others if not other.startswith("-")} == {"not yet run"}


@pytest.mark.parametrize(
    "base",
    [
        [],
        [result_of(BASE, validation=91.0, machine=GPU)],
        [result_of(BASE, validation=91.0, seed=1)],
        [result_of(BASE, validation=91.0, epochs=3, of_epochs=5)],
        [result_of(BASE, validation=91.0, precision="float16")],
    ],
    ids=["missing", "other device", "other seed", "unfinished", "other precision"],
)
def test_without_a_comparable_base_there_is_no_difference(base):
    change = changes(alternative=True)[0]
    runs = [*base, result_of(change.id, validation=92.0)]
    assert rows_of(alternatives(runs))[change.change][3] == "-"


def test_the_curves_are_those_of_the_first_seed():
    runs = [
        result_of("cifar10_fast", seed=1, curve=curve_of(1.0)),
        result_of("cifar10_fast", seed=0, curve=curve_of(2.0, 3.0)),
        result_of("cifar10_best", curve=curve_of(94.0)),  # measured once, at its end
        result_of(BASE, curve=curve_of(5.0, 6.0)),
        result_of("cifar100_fast", data="cifar100", curve=curve_of(4.0, 5.0), machine=GPU),
    ]
    cpu, gpu = pictures(runs)
    assert (cpu.name, gpu.name) == ("curves_cifar10_cpu.png", "curves_cifar100_gpu.png")
    curve, base = cpu.curves
    assert (curve.name, curve.split, curve.points) == ("cifar10_fast", "test", ((1.0, 2.0), (2.0, 3.0)))
    assert base.name == BASE
    assert "(../results/curves_cifar10_cpu.png)" in curves(runs)


@pytest.mark.parametrize("page", ["", "<!-- figures: curves, x -->\n\n<!-- end of figures -->\n"])
def test_a_page_without_a_block_is_an_error(page):
    with pytest.raises(InputError, match=f"should have {', '.join(BLOCKS)}, each once"):
        with_blocks(page, BLOCKS, [])


def test_an_installed_package_has_no_page(tmp_path):
    with pytest.raises(InputError, match="run this in a checkout"):
        write_page(tmp_path)


def test_every_record_is_of_an_experiment_in_the_catalogue():
    assert {result.id for result in read_results(RESULTS / "results.json")} <= CATALOGUE.keys()


def test_every_command_names_the_experiment_of_its_record():
    for result in read_results(RESULTS / "results.json"):
        assert f"{result.command} ".startswith(f"python -m distributed.experiments --only {result.id} "), result.key
