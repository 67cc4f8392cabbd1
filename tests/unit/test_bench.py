import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distributed.bench import training_speed
from distributed.bench.__main__ import main
from distributed.bench.benchmarks import BENCHMARKS
from distributed.bench.machine import machine
from distributed.bench.measure import StepClock, step_seconds, typical_step_seconds
from distributed.bench.options import CPU_ONLY, GPU_ONLY, WORKLOADS, Options
from distributed.bench.rounds import run_round, summary
from distributed.bench.workload import Workload, WorkloadFailedError
from distributed.bench.workloads.task import use_device
from distributed.config import TrainConfig, from_command_line
from distributed.training.determinism import restored_settings

CPU = Options(
    root=Path("nowhere"), steps=80, workloads=tuple(name for name in WORKLOADS if name not in GPU_ONLY),
    peers=Path("peers"), peer_python=Path("peers/bin/python"),
)  # fmt: skip
CUDA = Options(
    root=Path("nowhere"), steps=100, gpus=1, batches=(128, 512, 2048),
    workloads=tuple(name for name in WORKLOADS if name not in CPU_ONLY),
)  # fmt: skip
COMPUTE = Workload(
    "distributed.bench.workloads.bare_compute:eager", {"batch": 4, "device": "cpu", "threads": 1}, steps=8, batch=4
)


@pytest.fixture
def cifar_root(tmp_path):
    """Zero-filled files of the right sizes, enough for code that checks only sizes."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        with (folder / name).open("wb") as file:
            file.truncate(10_000 * 3073)
    return tmp_path


def bench(*arguments):
    command = [sys.executable, "-m", "distributed.bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def devices_of(workload):
    arguments = workload.settings.get("arguments")
    device = arguments[arguments.index("--device") + 1] if arguments else workload.settings["device"]
    return {workload.device, device}


# Workloads


def test_on_a_gpu_every_workload_runs_at_every_batch_size():
    found = training_speed.workloads(CUDA, "runs")
    for batch in (128, 512, 2048):
        assert [name for name in found if name.endswith(f", batch {batch}")] == [
            f"compute alone, batch {batch}",
            f"compute alone (CUDA graph), batch {batch}",
            f"ours (fast), 1 GPU, batch {batch}",
            f"ours (exact, 8 shards), 1 GPU, batch {batch}",
            f"references' plain loop (float32, TF32 off), batch {batch}",
            f"timm (bfloat16), batch {batch}",
            f"accelerate (bfloat16), batch {batch}",
            f"Lightning (bfloat16), batch {batch}",
        ]
    assert len(found) == 24
    for name, workload in found.items():
        assert devices_of(workload) == {"cuda"}, name
        assert name.startswith("ours") or name.endswith(f", batch {workload.batch}")


def test_on_a_cpu_one_and_two_processes_are_measured():
    assert list(training_speed.workloads(CPU, "runs")) == [
        "compute alone, batch 128",
        "ours (fast), 1 process x 2 threads, batch 128",
        "ours (fast), 2 processes x 1 thread, batch 128",
        "ours (exact, 8 shards), 1 process x 2 threads, batch 128",
        "ours (exact, 8 shards), 2 processes x 1 thread, batch 128",
        "ours (default), 2 processes, batch 128",
        "references' plain loop, batch 128",
        "timm (bfloat16), batch 128",
        "accelerate (bfloat16), batch 128",
        "Lightning (bfloat16), batch 128",
    ]
    assert all(devices_of(workload) == {"cpu"} for workload in training_speed.workloads(CPU, "runs").values())


def test_several_gpus_get_one_rank_each():
    found = training_speed.workloads(replace(CUDA, gpus=4, workloads=("ours",), batches=(128,)), "runs")
    assert {name: workload.ranks for name, workload in found.items()} == {
        "ours (fast), 1 GPU, batch 128": 0,
        "ours (fast), 4 GPUs, batch 128": 4,
    }


def test_every_benchmark_runs_on_the_chosen_device(tmp_path):
    for name in ("exact", "save", "engines", "norm"):
        workloads = BENCHMARKS[name].workloads(replace(CUDA, batches=(128,)), str(tmp_path))
        assert {device for workload in workloads.values() for device in devices_of(workload)} == {"cuda"}, name


def test_on_a_gpu_our_incomplete_batch_has_fewer_images():
    found = training_speed.workloads(replace(CUDA, workloads=("compute", "ours"), batches=(2048,)), "runs")
    assert [workload.batch for workload in found.values()] == [2048, 2000]
    (ours,) = training_speed.workloads(replace(CPU, workloads=("default",), batches=(2048,)), "runs").values()
    assert ours.batch == 2048


def test_only_the_chosen_workloads_run():
    assert list(training_speed.workloads(replace(CUDA, workloads=("graph",), batches=(512,)), "runs")) == [
        "compute alone (CUDA graph), batch 512"
    ]


def test_only_peers_run_in_their_environment():
    found = training_speed.workloads(CPU, "runs")
    elsewhere = [name.split()[0] for name, workload in found.items() if workload.python == CPU.peer_python]
    assert elsewhere == ["timm", "accelerate", "Lightning"]
    assert {workload.python for workload in found.values()} == {CPU.peer_python, Path(sys.executable)}


def test_peers_compute_float32_in_float32():
    with restored_settings():
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        use_device("cpu", 0)
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)


def test_the_default_row_is_what_make_train_runs():
    (workload,) = training_speed.workloads(replace(CPU, workloads=("default",)), "runs").values()
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),{workload.ranks})" in makefile
    measured, default = from_command_line(workload.settings["arguments"]).config, TrainConfig()
    for name in (
        "model",
        "exact",
        "engine",
        "optim",
        "loss",
        "channels_last",
        "threads",
        "seed",
        "compile",
    ):
        assert getattr(measured, name) == getattr(default, name), name
    assert measured.global_batch_size == default.global_batch_size
    assert measured.shards_on("cpu") == 8
    assert measured.precision == "bfloat16", "as in the other rows"


def test_what_a_peer_lacks_is_printed_beside_its_figure():
    figures = {"timm (bfloat16), batch 128": 2.0, "ours (default), 2 processes, batch 128": 6.0}
    lines = summary(BENCHMARKS["train"], [figures]).splitlines()
    assert lines[0].endswith("; no synchronized batch norm on a CPU, no bit-exact resume")
    assert not any("resume" in line for line in lines[1:])
    assert lines[2].split("/ timm (bfloat16)")[1].split()[0] == "3.000"


# The clock and figures


def test_a_gpu_is_waited_for_after_blocks_of_steps():
    assert CUDA.block == 10
    assert replace(CUDA, steps=16).block == 2  # at least eight readings
    assert CPU.block == 1


def test_the_clock_is_read_after_each_block_and_the_last_step():
    clock = StepClock("cpu", 12, block=5)
    assert [clock.tick() for _ in range(12)] == [False] * 11 + [True]
    assert [step for step, _ in clock.readings] == [5, 10, 12]
    assert clock.tick()
    assert len(clock.readings) == 3


def test_a_clock_past_its_limit_stops_after_four_readings():
    clock = StepClock("cpu", 1000, block=2, until=time.monotonic() - 1)
    assert [clock.tick() for _ in range(8)] == [False] * 7 + [True]


def test_a_step_takes_its_fraction_of_a_block():
    readings = [(10, 100.0), (20, 110.0), (30, 115.0), (40, 119.0), (42, 120.0)]
    assert step_seconds(readings) == [0.5, 0.4, 0.5]


def test_on_a_gpu_the_mean_counts_every_step():
    readings = [(10 * n, n + 0.5 * (n > 8)) for n in range(1, 17)]
    assert typical_step_seconds(readings, "cpu") == pytest.approx(0.1)
    assert typical_step_seconds(readings, "cuda") == pytest.approx(13.5 / 130)


def test_several_gpus_are_not_compared_with_one():
    figures = {"ours (fast), 2 GPUs, batch 128": 6.0, "timm (bfloat16), batch 128": 2.0}
    assert training_speed.ratios(figures) == {}


def test_the_benchmarks_own_limit_is_no_timeout():
    options = replace(CPU, steps=8, workloads=("compute",), batches=(4,))
    _, errors = run_round(BENCHMARKS["train"], options, time.monotonic() + 0.2)
    assert {str(error) for error in errors.values()} == {"ended by the time limit --minutes"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("memory", "--rounds", 3), "error: --rounds: memory has no such option; leave it out"),
        (("page", "--json", "x.json"), "error: --json: page has no such option; leave it out"),
        (("page", "--data.root", "x"), "error: --data.root: page has no such option; leave it out"),
        (
            ("scaling", "--from", "a.json", "--json", "b.json"),
            "error: --from: measures nothing, so --json has nothing to write; leave one of them out",
        ),
    ],
)
def test_an_option_without_effect_is_refused(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    assert main() == 2
    assert capsys.readouterr().err.strip() == line


def test_ratios_compare_measured_workloads_of_one_batch_size():
    figures = {
        "ours (fast), 1 GPU, batch 128": 6.0,
        "timm (bfloat16), batch 128": 2.0,
        "timm (bfloat16), batch 512": 1.0,
    }
    assert training_speed.ratios(figures) == {"ours (fast), 1 GPU, batch 128 / timm (bfloat16)": 3.0}


def test_ratios_of_exact_mode_are_to_fast_mode_and_compute():
    fast = "fast (plain on one process, else with synchronized batch norm)"
    figures = {
        "compute alone": 2.0, f"1 GPU: {fast}": 4.0, f"1 GPU: {fast}, memory per process [MiB]": 9.0,
        "1 GPU: exact, 2 shards": 6.0, "1 GPU: exact, 8 shards": 8.0, "2 GPUs: exact, 8 shards": 8.0,
    }  # fmt: skip
    assert BENCHMARKS["exact"].ratios_of(figures) == {
        "1 GPU: exact, 2 shards / fast": 1.5,
        "1 GPU: exact, 8 shards / fast": 2.0,
        "1 GPU: exact, 8 shards / compute alone": 4.0,
    }


def test_two_processes_are_compared_with_two_threads():
    fast = "fast (plain on one process, else with synchronized batch norm)"
    one, two = "1 process x 2 threads", "2 processes x 1 thread"
    figures = {
        f"{one}: {fast}": 4.0,
        f"{two}: {fast}": 5.0,
        f"{one}: exact, 2 shards": 9.0,
        f"{two}: exact, 2 shards": 6.0,
    }
    ratios = BENCHMARKS["exact"].ratios_of(figures)
    assert ratios[f"{two}: fast, speed relative to {one}"] == 0.8
    assert ratios[f"{two}: exact, 2 shards, speed relative to {one}"] == 1.5


def test_another_network_is_measured_without_compute_alone():
    found = BENCHMARKS["exact"].workloads(replace(CPU, network="torchvision.models:resnet18"), "runs")
    assert "compute alone" not in found
    for workload in found.values():
        arguments = workload.settings["arguments"]
        assert arguments[arguments.index("--model.name") + 1] == "torchvision.models:resnet18"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_round_in_which_everything_failed_has_no_ratios(name):
    assert BENCHMARKS[name].ratios_of({}) == {}


# Rounds


@pytest.mark.timeout(300)
def test_a_failing_workload_does_not_stop_the_others(tmp_path, capsys):
    broken = replace(COMPUTE, settings={**COMPUTE.settings, "batch": -4})
    benchmark = BENCHMARKS["train"]._replace(workloads=lambda options, folder: {"broken": broken, "sound": COMPUTE})
    figures, failed = run_round(benchmark, CPU, time.monotonic() + 100)
    assert list(figures) == ["sound"]
    assert figures["sound"] > 0
    assert str(failed["broken"]).startswith("RuntimeError: Trying to create tensor with negative dimension -4")
    assert "Traceback" in failed["broken"].output
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert line == f"failed: broken: {failed['broken']}"
    assert "sound" in summary(benchmark, [figures, {}])


def test_no_workload_starts_after_the_deadline():
    benchmark = BENCHMARKS["train"]._replace(workloads=lambda options, folder: {"late": COMPUTE})
    figures, failed = run_round(benchmark, CPU, time.monotonic() - 1)
    assert figures == {}
    assert str(failed["late"]) == "not started: the time limit --minutes is reached"


def test_a_workload_that_takes_too_long_is_ended():
    start = time.monotonic()
    with pytest.raises(WorkloadFailedError, match=r"^timed out after 2 s$"):
        replace(COMPUTE, steps=10**9, ranks=2).measure(2)
    assert time.monotonic() - start < 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slow_workload_is_measured_within_its_time_limit():
    measured = replace(COMPUTE, steps=10**9).measure(20)
    assert 4 <= len(measured.readings) < 10**9
    assert measured.memory_mib > 0


# The command


@pytest.mark.timeout(300)
def test_one_failure_means_exit_code_1_and_all_other_figures(cifar_root, tmp_path):
    """Exact mode cannot split a batch of 4 into 8 shards. `--contenders` is the former name of `--workloads`."""
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
            "error: --device cuda: no CUDA device is visible; use --device cpu, or check nvidia-smi",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (
            ("train", "--device", "cpu", "--workloads", "graph"),
            "error: --workloads graph: CUDA graphs need --device cuda",
        ),
        (
            ("train", "--device", "cpu", "--batches", "0"),
            "error: --batches 0: each must be from 1 to 50,000, the training images",
        ),
        (
            ("train", "--device", "cpu", "--steps", "4"),
            "error: --steps 4: must be at least 8; the first quarter is warm-up",
        ),
        (
            ("train", "--device", "cpu", "--workloads", "compute", "timm", "--no-peers"),
            "error: --no-peers: contradicts --workloads timm",
        ),
        (("norm", "--no-peers"), "error: --peers and --no-peers: apply to train and accuracy only, not to norm"),
        (("startup", "--steps", "9"), "error: --steps: does not apply to startup, which takes one step"),
        (("norm", "--network", "alexnet"), "error: --network: applies to exact only, not to norm"),
        (("train", "--device", "cpu", "--rounds", "0"), "error: --rounds 0: must be at least 1"),
        (("train", "--device", "cpu", "--seconds", "0"), "error: --seconds 0: must be greater than 0"),
        (
            ("norm", "--device", "cpu", "--batches", "512"),
            "error: --batches and --workloads: apply to train only, not to norm",
        ),
    ],
)
def test_invalid_arguments_are_one_line_and_exit_code_2(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert main() == 2
    assert capsys.readouterr() == ("", f"{line}\n")


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", ["eager", "graph"])
def test_compute_alone_runs_on_a_gpu(function):
    settings = {"batch": 16, "device": "cuda", "threads": 0}
    name = f"distributed.bench.workloads.bare_compute:{function}"
    measured = Workload(name, settings, 20, "cuda", 5, 16).measure(60)
    assert [step for step, _ in measured.readings] == [5, 10, 15, 20]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_machine_includes_card_driver_and_cudnn():
    assert {"card", "driver", "cudnn"} <= machine("cuda")["gpu"].keys()
