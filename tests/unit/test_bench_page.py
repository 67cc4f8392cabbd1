"""docs/benchmarks.md is what `python -m distributed.bench page` writes."""

import json
import shutil
from pathlib import Path

import pytest

from distributed.bench.page import BLOCKS, page_with_figures, write_page
from distributed.bench.page_blocks import scaling, train_cpu, train_gpu
from distributed.errors import InputError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
MACHINE = {
    "date": "2026-12-01", "processor": "CPU", "cores": 2, "gpu": {"card": "GPU"},
    "versions": {"torch": "2.14.1", "timm": "1.0.31", "accelerate": "1.15.0", "lightning": "2.6.6"},
}  # fmt: skip


def results_of(*rounds, failed=()):
    return {"command": "python -m distributed.bench x", "machine": MACHINE, "rounds": [*rounds], "failed": [*failed]}


def rows_of(block):
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in table}


def test_the_page_has_the_figures_of_the_results():
    assert page_with_figures(PAGE.read_text(), ROOT / "results") == PAGE.read_text()


def test_a_changed_result_changes_the_page(tmp_path):
    for folder in ("docs", "results"):
        (tmp_path / folder).mkdir()
    shutil.copy(PAGE, tmp_path / "docs")
    for file in (ROOT / "results").glob("bench_*.json"):
        shutil.copy(file, tmp_path / "results")
    file = tmp_path / "results" / "bench_train_cpu.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"rounds": [{"compute alone": 123.4}]}))
    before = PAGE.read_text().splitlines()
    after = write_page(tmp_path).read_text().splitlines()
    assert any("| 123 |" in line for line in after)
    begin = next(number for number, line in enumerate(before) if "figures: train_cpu" in line)
    end = before.index("<!-- end of figures -->", begin)
    outside = before[:begin] + before[end:]
    assert [line for line in outside if line not in after] == []


def test_beside_each_peer_is_what_it_does_not_do():
    rows = rows_of(
        train_cpu({
            "bench_train_cpu": results_of(
                {
                    "ours (fast), 1 process x 2 threads, batch 128": 300.0,
                    "ours (fast), 2 processes x 1 thread, batch 128": 200.0,
                    "ours (default), 2 processes, batch 128": 110.0,
                    "timm (bfloat16), batch 128": 100.0,
                    "Lightning (bfloat16), batch 128": 50.0,
                },
                {"timm (bfloat16), batch 128": 90.0, "ours (default), 2 processes, batch 128": 117.0},
            )
        })
    )  # fmt: skip
    assert rows == {
        "": ["images/s", "vs. timm", "synchronized batch norm on a CPU", "bit-exact resume"],
        "---": ["---"] * 4,
        "fast mode, 1 process x 2 threads (its better layout)": [
            "300",
            "3.00",
            "yes",
            "on the same number of processes",
        ],
        "fast mode, 2 processes x 1 thread": ["200", "2.00", "yes", "on the same number of processes"],
        "the default, which `make train` runs: exact mode, 8 shards, 2 processes": ["114", "1.20", "yes", "yes"],
        "timm 1.0.31, bfloat16, channels last": ["95", "1", "no", "no"],
        "Lightning 2.6.6, bfloat16, channels last": ["50", "0.50", "no", "no"],
    }


def test_a_workload_without_a_figure_is_in_the_gpu_table():
    figures = {f"timm (bfloat16), batch {batch}": 2.0 for batch in (128, 512, 2048)}
    figures["Lightning (bfloat16), batch 128"] = 1.0
    failed = {
        "Lightning (bfloat16), batch 512": "timed out after 40 s",
        "Lightning (bfloat16), batch 2048": "RuntimeError: out of memory",
    }
    rows = rows_of(train_gpu({"bench_train_gpu": results_of(figures, failed=[failed])}))
    assert rows["Lightning 2.6.6, bfloat16, channels last"] == ["1", "timed out", "failed"]
    for ended in ("ended by the time limit --minutes", "not started: the time limit --minutes is reached"):
        failed["Lightning (bfloat16), batch 512"] = ended
        rows = rows_of(train_gpu({"bench_train_gpu": results_of(figures, failed=[failed])}))
        assert rows["Lightning 2.6.6, bfloat16, channels last"] == ["1", "not measured", "failed"]


def test_scaling_that_was_not_measured_is_named():
    assert scaling({}) == "Not measured yet on a quiet machine."


@pytest.mark.parametrize("page", ["", "<!-- figures: scaling, x -->\n\n<!-- end of figures -->\n"])
def test_a_page_without_a_block_is_an_error(page, tmp_path):
    with pytest.raises(InputError, match=f"should have {', '.join(BLOCKS)}, each once"):
        page_with_figures(page, tmp_path)


def test_an_installed_package_has_no_page(tmp_path):
    with pytest.raises(InputError, match="run this in a checkout"):
        write_page(tmp_path)
