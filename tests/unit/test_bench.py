import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distributed.bench import train
from distributed.bench.__main__ import main, run_round, summary
from distributed.bench.clock import StepClock
from distributed.bench.kinds import KINDS
from distributed.bench.options import CONTENDERS, Options
from distributed.bench.rounds import Contender, ContenderFailedError, machine, step_seconds

CPU = Options(root=Path("nowhere"), steps=80, contenders=tuple(name for name in CONTENDERS if name != "graph"))
CUDA = Options(root=Path("nowhere"), steps=100, gpus=1, batches=(128, 512, 2048))
COMPUTE = Contender("distributed.bench.compute:eager", {"batch": 4, "device": "cpu", "threads": 1}, steps=8, batch=4)


@pytest.fixture
def peers_there(monkeypatch):
    """As if timm and Lightning were installed: a module that always is stands in for each."""
    monkeypatch.setattr(train, "PACKAGES", {"timm": ("json",), "lightning": ("no_such_module", "json")})


@pytest.fixture
def cifar_root(tmp_path):
    """Files of the right sizes, all zeros: enough for what looks at sizes alone."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        with (folder / name).open("wb") as file:
            file.truncate(10_000 * 3073)
    return tmp_path


def bench(*arguments):
    command = [sys.executable, "-m", "distributed.bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def devices_of(contender):
    arguments = contender.settings.get("arguments")
    given = arguments[arguments.index("--device") + 1] if arguments else contender.settings["device"]
    return {contender.device, given}


def test_on_a_gpu_every_contender_runs_there_at_every_batch(peers_there):
    found = train.contenders(CUDA, "runs")
    for batch in (128, 512, 2048):
        assert [name for name in found if name.endswith(f", batch {batch}")] == [
            f"compute alone, batch {batch}",
            f"compute alone (CUDA graph), batch {batch}",
            f"ours (fast), 1 GPU, batch {batch}",
            f"ours (exact, 8 shards), 1 GPU, batch {batch}",
            f"seeds' plain loop (float32, TF32 off), batch {batch}",
            f"timm (bfloat16), batch {batch}",
            f"Lightning (bfloat16), batch {batch}",
        ]
    assert len(found) == 21
    for name, contender in found.items():
        assert devices_of(contender) == {"cuda"}, name
        assert name.endswith(f", batch {contender.batch}")


def test_on_a_cpu_ours_is_measured_on_one_and_on_two_processes(peers_there):
    assert list(train.contenders(CPU, "runs")) == [
        "compute alone, batch 128",
        "ours (fast), 1 process x 2 threads, batch 128",
        "ours (fast), 2 processes x 1 thread, batch 128",
        "ours (exact, 8 shards), 1 process x 2 threads, batch 128",
        "ours (exact, 8 shards), 2 processes x 1 thread, batch 128",
        "seeds' plain loop, batch 128",
        "timm (bfloat16), batch 128",
        "Lightning (bfloat16), batch 128",
    ]
    assert all(devices_of(contender) == {"cpu"} for contender in train.contenders(CPU, "runs").values())


def test_several_gpus_are_used_one_rank_each():
    found = train.contenders(replace(CUDA, gpus=4, contenders=("ours",), batches=(128,)), "runs")
    assert {name: c.ranks for name, c in found.items()} == {
        "ours (fast), 1 GPU, batch 128": 0,
        "ours (fast), 4 GPUs, batch 128": 4,
    }


def test_every_benchmark_runs_all_its_contenders_on_the_chosen_device(tmp_path):
    for name in ("exact", "save", "engines", "norm"):
        contenders = KINDS[name].contenders(replace(CUDA, batches=(128,)), str(tmp_path))
        assert {device for c in contenders.values() for device in devices_of(c)} == {"cuda"}, name


def test_the_chosen_contenders_alone_are_run():
    assert list(train.contenders(replace(CUDA, contenders=("graph",), batches=(512,)), "runs")) == [
        "compute alone (CUDA graph), batch 512"
    ]


def test_a_peer_that_is_not_installed_is_skipped(monkeypatch):
    monkeypatch.setattr(train, "PACKAGES", {"timm": ("no_such_module",), "lightning": ("no_such_module", "json")})
    options = replace(CPU, contenders=("timm", "lightning"))
    assert train.skipped(options) == {"timm": "not installed"}
    assert list(train.contenders(options, "runs")) == ["Lightning (bfloat16), batch 128"]


def test_the_clock_of_a_gpu_is_read_after_blocks_of_steps_that_epoch_ends_seldom_fall_into():
    assert [CUDA.block(batch) for batch in (128, 512, 2048)] == [10, 10, 4]
    assert replace(CUDA, steps=8).block(128) == 2  # four readings at least
    assert CPU.block(128) == 1


def test_a_clock_reads_at_the_end_of_each_block_and_after_the_last_step():
    clock = StepClock("cpu", 12, block=5)
    assert [clock.tick() for _ in range(12)] == [False] * 11 + [True]
    assert [step for step, _ in clock.readings] == [5, 10, 12]
    assert clock.tick()
    assert len(clock.readings) == 3


def test_a_clock_out_of_time_stops_after_four_readings():
    clock = StepClock("cpu", 1000, block=2, until=time.monotonic() - 1)
    assert [clock.tick() for _ in range(8)] == [False] * 7 + [True]


def test_seconds_of_a_step_are_those_of_its_block_shared_out():
    readings = [(10, 100.0), (20, 110.0), (30, 115.0), (40, 119.0), (42, 120.0)]
    assert step_seconds(readings) == [0.5, 0.4, 0.5]


def test_ratios_are_taken_within_a_batch_and_only_of_what_was_measured():
    figures = {
        "ours (fast), 1 GPU, batch 128": 6.0,
        "timm (bfloat16), batch 128": 2.0,
        "timm (bfloat16), batch 512": 1.0,
    }
    assert train.ratios(figures) == {"ours (fast), 1 GPU, batch 128 / timm (bfloat16)": 3.0}


@pytest.mark.parametrize("name", KINDS)
def test_ratios_of_a_round_in_which_everything_failed_are_none(name):
    assert KINDS[name].ratios_of({}) == {}


@pytest.mark.timeout(300)
def test_a_contender_that_fails_does_not_stop_the_others(tmp_path, capsys):
    broken = replace(COMPUTE, settings={**COMPUTE.settings, "batch": -4})
    kind = KINDS["train"]._replace(contenders=lambda options, folder: {"broken": broken, "sound": COMPUTE})
    figures, failed = run_round(kind, CPU, time.monotonic() + 100)
    assert list(figures) == ["sound"]
    assert figures["sound"] > 0
    assert str(failed["broken"]).startswith("RuntimeError: Trying to create tensor with negative dimension -4")
    assert "Traceback" in failed["broken"].output
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert line == f"failed: broken: {failed['broken']}"
    assert "sound" in summary(kind, [figures, {}])


def test_no_contender_is_started_once_time_is_up():
    kind = KINDS["train"]._replace(contenders=lambda options, folder: {"late": COMPUTE})
    figures, failed = run_round(kind, CPU, time.monotonic() - 1)
    assert figures == {}
    assert str(failed["late"]) == "not started: no time was left"


def test_a_contender_that_takes_too_long_is_ended():
    start = time.monotonic()
    with pytest.raises(ContenderFailedError, match=r"^timed out after 2 s$"):
        replace(COMPUTE, steps=10**9, ranks=2).measure(2)
    assert time.monotonic() - start < 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slow_contender_is_measured_for_as_long_as_it_may_take():
    measured = replace(COMPUTE, steps=10**9).measure(20)
    assert 4 <= len(measured.readings) < 10**9
    assert measured.memory_mib > 0


@pytest.mark.timeout(300)
def test_one_failure_ends_the_command_with_1_and_all_figures_are_written(cifar_root, tmp_path):
    """Exact mode cannot cut a batch of 4 into 8 shards."""
    file = tmp_path / "figures.json"
    done = bench(
        "train", "--device", "cpu", "--data.root", cifar_root, "--rounds", 1, "--steps", 8, "--batches", 4,
        "--contenders", "exact", "compute", "--json", file,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert (
        "failed: ours (exact, 8 shards), 1 process x 2 threads, batch 4: distributed.errors.InputError: exact.shards = 8"
        in done.stderr
    )
    assert "compute alone, batch 4" in done.stdout
    assert "ours" not in done.stdout
    assert '"compute alone, batch 4":' in file.read_text()
    assert "exact.shards = 8 is more than the 4 images" in file.with_suffix(".failed.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param(
            ("train", "--device", "cuda"),
            "error: --device cuda: no CUDA device is to be seen; use --device cpu, or check nvidia-smi",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (
            ("train", "--device", "cpu", "--contenders", "graph"),
            "error: --contenders graph: CUDA graphs need --device cuda",
        ),
        (
            ("train", "--device", "cpu", "--batches", "0"),
            "error: --batches 0: each from 1 to the 50,000 training images",
        ),
        (
            ("train", "--device", "cpu", "--steps", "4"),
            "error: --steps 4: must be at least 8; the first quarter is warm-up",
        ),
        (("train", "--device", "cpu", "--rounds", "0"), "error: --rounds 0: at least 1"),
        (("train", "--device", "cpu", "--seconds", "0"), "error: --seconds 0: must be more than 0"),
        (
            ("norm", "--device", "cpu", "--batches", "512"),
            "error: --batches and --contenders: only for train, not for norm",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert main() == 2
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", ["eager", "graph"])
def test_compute_alone_on_a_gpu(function):
    settings = {"batch": 16, "device": "cuda", "threads": 0}
    measured = Contender(f"distributed.bench.compute:{function}", settings, 20, "cuda", 5, 16).measure(60)
    assert [step for step, _ in measured.readings] == [5, 10, 15, 20]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_machine_is_named_with_card_driver_and_cudnn():
    assert {"card", "driver", "cudnn"} <= machine("cuda")["gpu"].keys()
