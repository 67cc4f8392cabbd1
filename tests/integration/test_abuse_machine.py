"""Runs on a changed machine: variables that select kernels, CPU quotas and leftover locks are reported."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.abuse import Outcome, assert_outcome, call, untouched
from kit.commands import ROOT
from kit.trained_runs import copy_of

from distributed.files import read_object, replace_json
from distributed.host import cpu_quota
from distributed.run import claim, lock_holder
from distributed.topology import kernel_variables

pytestmark = pytest.mark.timeout(200)
SETTINGS = (
    ROOT / "configs/debug.toml", "--data.train_samples", 40, "--data.test_samples", 20, "--global_batch_size", 20,
    "--schedule.name", "constant", "--data.validation_fraction", 0, "--device", "cpu", "--evaluation.batch_size", 20,
)  # fmt: skip
SELECTING = {
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
}
ALSO_SELECTING = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA",
    "OMP_THREAD_LIMIT": "1",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "ONEDNN_CPU_ISA_HINTS": "PREFER_YMM",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_DEFAULT_FPMATH_MODE": "ANY",
    "MKL_CBWR_BRANCH": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_DEBUG_CPU_TYPE": "5",
    "MKL_DYNAMIC": "TRUE",
    "MKL_DOMAIN_NUM_THREADS": "MKL_DOMAIN_BLAS=1",
    "MKL_THREADING_LAYER": "SEQUENTIAL",
    "OPENBLAS_CORETYPE": "Zen",
    "BLIS_ARCH_TYPE": "zen3",
    "OMP_DYNAMIC": "true",
    "KMP_DETERMINISTIC_REDUCTION": "true",
    "KMP_FORCE_REDUCTION": "tree",
    "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "PYTORCH_TUNABLEOP_ENABLED": "1",
    "DISABLE_ADDMM_CUDA_LT": "1",
    "TORCH_LINALG_PREFER_CUSOLVER": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
}
NOT_SELECTING = {
    "ONEDNN_VERBOSE": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9",
    "MKL_VERBOSE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "KMP_AFFINITY": "none",
    "TORCHINDUCTOR_CACHE_DIR": "/nowhere",
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCH_LOGS": "",
    "NCCL_DEBUG": "INFO",
}


def train(run: Path, *arguments: object, epochs: int = 1, **environment: str) -> Outcome:
    return call("train", *SETTINGS, "--run_dir", run, "--epochs", epochs, *arguments, **environment)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine") / "run"
    found = train(folder)
    assert found.code == 0, found.err
    return folder


@pytest.fixture(scope="module")
def longer(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, resumed on the same machine."""
    folder = copy_of(run, tmp_path_factory.mktemp("machine") / "longer")
    found = train(folder, epochs=2)
    assert (found.code, warnings(found)) == (0, []), found.err
    return folder


def warnings(found: Outcome) -> list[str]:
    """Return its warnings about a changed machine."""
    return [
        line.partition("resuming with a different ")[2] for line in found.err.splitlines() if "resuming with" in line
    ]


def change_last_save(run: Path) -> None:
    """Change the last save of a run, as another kernel would."""
    file = run / "digests.jsonl"
    *lines, last = file.read_text().splitlines()
    changed = json.loads(last)
    changed["tensors"] |= dict.fromkeys(list(changed["tensors"])[:1], "0")
    file.write_text("\n".join([*lines, json.dumps(changed)]) + "\n")


@pytest.mark.parametrize("name", SELECTING)
def test_resume_under_a_new_variable_warns(run: Path, longer: Path, tmp_path: Path, name: str) -> None:
    resumed = copy_of(run, tmp_path / "resumed")
    found = train(resumed, epochs=2, **{name: SELECTING[name]})
    assert found.code == 0, found.err
    assert warnings(found) == [f"{name}: not set before, {SELECTING[name]} now; bits may differ"]
    change_last_save(resumed)
    compared = call("compare", longer, resumed)
    assert compared.code == 1, compared.out
    assert f"  {name}: not set | not set, {SELECTING[name]}" in compared.out.splitlines()


def test_resume_without_the_variable_warns(run: Path, tmp_path: Path) -> None:
    given = {"MKL_CBWR": "COMPATIBLE"}
    first = copy_of(run, tmp_path / "first")
    train(first, epochs=2, **given)
    second = copy_of(first, tmp_path / "second")
    assert warnings(train(first, epochs=3, **given)) == []
    assert warnings(train(second, epochs=3)) == ["MKL_CBWR: COMPATIBLE before, not set now; bits may differ"]
    change_last_save(second)
    out = call("compare", first, second).out
    assert "  MKL_CBWR: not set, COMPATIBLE | not set, COMPATIBLE, not set" in out.splitlines()


KERNELS = """
import json, torch
from distributed.training.determinism import kernel_metadata
print(json.dumps(kernel_metadata(torch.device("cpu"))))
"""


def kernels_in_a_new_process(**environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def test_aten_cpu_capability_is_recorded() -> None:
    assert kernels_in_a_new_process(ATEN_CPU_CAPABILITY="default")["ATen's CPU capability"] == "DEFAULT"


def test_preloaded_math_library_is_recorded() -> None:
    found = sorted(Path("/usr/lib").glob("*/libgomp.so.1")) or sorted(Path("/usr/lib").glob("*/lib*blas*.so.*"))
    if not found:
        pytest.skip("no math or thread library besides torch's")
    before, after = kernels_in_a_new_process(), kernels_in_a_new_process(LD_PRELOAD=str(found[0]))
    different = {name for name in after if after[name] != before.get(name)}
    assert different == {"other math libraries"}
    assert after["other math libraries"].startswith(found[0].resolve().name)


@pytest.mark.parametrize("name", ALSO_SELECTING)
def test_variable_that_selects_kernels_is_recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name, raising=False)
    assert name not in kernel_variables()
    monkeypatch.setenv(name, ALSO_SELECTING[name])
    assert kernel_variables()[name] == ALSO_SELECTING[name]


@pytest.mark.parametrize("name", NOT_SELECTING)
def test_other_variables_are_not_recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, NOT_SELECTING[name])
    assert name not in kernel_variables()


def test_fast_mode_warns_that_a_quota_changed_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    fast = ("--exact.shards", 0)
    found = train(tmp_path / "run", *fast)
    assert found.code == 0, found.err
    assert "CPU quota" not in found.err
    monkeypatch.setattr(cpu_quota, "cpu_quota", lambda: 1.0)
    found = train(tmp_path / "run", *fast, epochs=2)
    assert found.code == 0, found.err
    assert warnings(found) == ["threads: 2 before, 1 now; bits may differ"]
    assert found.err.count("CPU quota") == 1


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let another process hold the lock; in this one, filelock would report a deadlock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


RECORDS: dict[str, Any] = {
    "of another host": {"pid": 1, "host": "elsewhere", "token": "x"},
    "of an older version": {"pid": 1, "host": "vm"},
    "of a job on an unknown cluster": {"host": "x", "slurm": {"job": "1", "restarts": 0, "cluster": "gone"}},
    "of a job id that is not a number": {"host": "x", "slurm": {"job": "$(true)", "restarts": 0}},
    "of a job without restarts": {"host": "x", "slurm": {"job": "1"}},
    "of a job that is a list": {"host": "x", "slurm": [1]},
    "whose pid is a string": {"pid": "1"},
    "whose pid is huge": {"pid": 2**70},
    "whose pid is true": {"pid": True},
    "that is empty": {},
}


@pytest.mark.parametrize("which", RECORDS)
def test_lock_of_a_possibly_living_holder_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setattr(claim, "LOCK_WAIT_SECONDS", 0.2)
    folder = copy_of(run, tmp_path / "run")
    replace_json(folder / "attempt.json", RECORDS[which])
    with locked(folder / ".lock"), untouched(folder / "checkpoints"):
        found = train(folder, epochs=2)
    assert_outcome(found, "another run is writing there", f"remove {folder / '.lock'}")


def test_lock_of_an_ended_holder_is_taken_over(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LOCK_WAIT_SECONDS", 1.0)
    folder = copy_of(run, tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    replace_json(folder / "attempt.json", lock_holder.this_process().as_json() | {"pid": process.pid, "token": "x"})
    with locked(folder / ".lock"):
        found = train(folder, epochs=2)
    assert found.code == 0, found.err
    assert f"process {process.pid} has ended" in found.err
    assert read_object(folder / "attempt.json")["pid"] == os.getpid()
