"""`precision = auto`: resolved by the devices of all ranks and by what the run has saved."""

import shutil
from pathlib import Path

import pytest
import torch
from kit.small_runs import FAST, small_config

from distributed.config import read_saved, with_values
from distributed.dry_run import dry_run
from distributed.errors import InputError
from distributed.host.hardware import multiplies_bfloat16
from distributed.recipe import train
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import read_metrics
from distributed.training.precision import for_evaluation, slow_precision, with_precision

CPU = torch.device("cpu")
AUTO = "bfloat16" if multiplies_bfloat16() else "float32"
OTHER = "float32" if multiplies_bfloat16() else "bfloat16"


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("avx2 f16c fma", False),  # AMD Zen 3, most laptops
        ("avx512bw avx512f avx512vl avx512_vnni", False),  # Intel Cascade Lake
        ("avx512_bf16 avx512f", True),  # AMD Zen 4
        ("amx_bf16 amx_tile avx512f", True),  # Intel Sapphire Rapids
        ("asimd asimdhp", False),
        ("asimd bf16 i8mm sve", True),  # Arm Neoverse V1
        ("", False),  # unknown
    ],
)
def test_instructions_for_bfloat16(instructions: str, expected: bool) -> None:
    assert multiplies_bfloat16(instructions) == expected


def test_a_run_records_the_precision_that_auto_stands_for(tmp_path: Path) -> None:
    train(small_config(tmp_path / "run", precision="auto", epochs=1))
    assert read_saved(RunFolder(tmp_path / "run").config_file).precision == AUTO


def test_auto_resumes_in_the_precision_of_the_run(tmp_path: Path) -> None:
    few = {"train_samples": 24, "test_samples": 10}
    model = {"name": "fast_alexnet", "widths": [4, 8, 8]}
    config = small_config(tmp_path / "run", precision=OTHER, epochs=1, global_batch_size=12, data=few, model=model)
    train(config)
    shutil.copytree(tmp_path / "run", tmp_path / "explicit")
    found = []
    for run, precision in (("run", "auto"), ("explicit", OTHER)):
        folder = RunFolder(tmp_path / run)
        train(with_values(config, run_dir=folder.path, epochs=2, precision=precision))
        assert read_saved(folder.config_file).precision == OTHER
        found.append([line.loss for line in read_metrics(folder.metrics_file) if line.kind == "train"])
    assert found[0] == found[1]


def test_auto_does_not_resume_a_run_in_float64(tmp_path: Path) -> None:
    """Its images would be float32: they are read before the ranks have agreed on a precision."""
    config = small_config(tmp_path / "run", precision="float64", epochs=1, data={"train_samples": 48})
    train(config)
    for again in (train, dry_run):
        with pytest.raises(InputError, match="this run computes in float64; resume it with --precision float64"):
            again(with_values(config, epochs=2, precision="auto"))


def test_a_saved_precision_that_the_engine_lacks_is_one_line() -> None:
    config = small_config(Path("run"), precision="auto", engine={"name": "deepspeed"}, exact=FAST)
    with pytest.raises(InputError, match=r"precision = float16.* deepspeed") as caught:
        with_precision(config, CPU, lambda _: {"config": {"precision": "float16"}})
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("precision", ["float32", "float64", AUTO])
def test_fast_precisions_give_no_warning(precision: str) -> None:
    config = small_config(Path("run"), precision=precision)
    assert slow_precision(config, CPU) is None
    assert for_evaluation(config, CPU) == config


@pytest.mark.parametrize("precision", ["float16", *(["bfloat16"] if OTHER == "bfloat16" else [])])
def test_slow_precisions_are_evaluated_in_float32(precision: str) -> None:
    config = small_config(Path("run"), precision=precision)
    assert f"precision = {precision} is many times slower" in str(slow_precision(config, CPU))
    assert for_evaluation(config, CPU).precision == "float32"
