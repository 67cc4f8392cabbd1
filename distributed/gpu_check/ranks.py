"""Step 5: trains on one, two and four ranks that share a GPU, over gloo: fast mode agrees closely, exact mode bit for bit."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from distributed.errors import ExitCode
from distributed.gpu_check import runs
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.processes import Process, Processes
from distributed.process.torchrun import torchrun_command

_SECONDS = 80.0
_EXACT: dict[str, object] = {"exact__shards": 8}
_CLIPPED: dict[str, object] = {**_EXACT, "precision": "float32", "optim__max_grad_norm": 0.5}


class _Case(NamedTuple):
    """Settings of a run that is trained at several world sizes."""

    name: str
    world_sizes: tuple[int, ...]
    settings: dict[str, object]

    def run(self, checks: Checks, world_size: int) -> Path:
        return checks.scratch / f"{self.name}-{world_size}"


FLOAT64 = _Case("fast-float64", (1, 2, 4), {"exact__shards": 0, "precision": "float64"})
FLOAT16 = _Case("fast-float16", (2,), {"exact__shards": 0, "precision": "float16"})
BFLOAT16 = _Case("exact-bfloat16", (1, 2, 4), {**_EXACT, "grad_accum_steps": 2})
FLOAT32 = _Case("exact-float32", (1, 2, 4), _CLIPPED)
FSDP = _Case("exact-float32-fsdp", (2,), {**_CLIPPED, "engine__name": "fsdp"})
_CASES = (BFLOAT16, FLOAT32, FSDP, FLOAT64, FLOAT16)


def run(checks: Checks) -> None:
    with Processes(checks.scratch / "logs", seconds=_SECONDS) as processes:
        groups = {world_size: _start_group(checks, processes, world_size) for world_size in (4, 2, 1)}
        torchrun = _start_torchrun(checks, processes)
        alone_on_gpu = checks.is_cuda and torch.cuda.device_count() == 1
        refused = _start_refused(checks, processes) if alone_on_gpu else []
        if refused:
            with checks.check("fsdp in fast mode, two ranks on one GPU: refused"):
                _check_refused(refused)
        _check_groups(checks, groups)
        for case in (FLOAT32, BFLOAT16):
            _check_exact(checks, case)
        with checks.check("exact mode, clipping, 2 ranks: fsdp bit-identical to ddp") as figures:
            figures["tensors"] = runs.assert_same_bits(FSDP.run(checks, 2), FLOAT32.run(checks, 2))
        _check_fast(checks)
        with checks.check("torchrun, 2 ranks, exact mode: bit-identical to one process") as figures:
            torchrun.succeed()
            figures["tensors"] = runs.assert_same_bits(_torchrun_run(checks), BFLOAT16.run(checks, 1))


def _arguments(checks: Checks, run: Path, settings: dict[str, object]) -> list[str]:
    """Return arguments for a run of a few steps, all of them logged, the last with fewer images."""
    batch, steps = (16, 2) if checks.tiny else (48, 6)
    if settings["exact__shards"] == 0:
        steps = 4 if checks.tiny else 20
    if checks.tiny and settings.get("precision") == "float16":  # which is very slow on a CPU
        batch = 6
    sizes: dict[str, object] = {
        "global_batch_size": batch, "data__train_samples": steps * batch - 3, "data__test_samples": 20,
        "data__validation_fraction": 0, "epochs": 1, "optim__lr": 0.01, "schedule__name": "constant",
        "logging__every_steps": 1,
    }  # fmt: skip
    if checks.tiny:
        sizes["threads"] = 1
    return runs.arguments(run, checks.device, **(sizes | settings))


def _start_group(checks: Checks, processes: Processes, world_size: int) -> list[Process]:
    """Start ranks that train all cases of this world size, one after the other."""
    cases = [case for case in _CASES if world_size in case.world_sizes]
    file = checks.scratch / f"runs-{world_size}.json"
    file.write_text(json.dumps([_arguments(checks, case.run(checks, world_size), case.settings) for case in cases]))
    module = "distributed.gpu_check.rank_runs"
    return processes.start_ranks(f"group-of-{world_size}", world_size, module, checks.device.type, file)


def _torchrun_run(checks: Checks) -> Path:
    return checks.scratch / "torchrun-2"


def _start_torchrun(checks: Checks, processes: Processes) -> Process:
    """Start `torchrun --nproc_per_node=2 -m distributed.train` as a user would."""
    options = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    arguments = _arguments(checks, _torchrun_run(checks), BFLOAT16.settings)
    return processes.start("torchrun", torchrun_command(2, "distributed.train", arguments, options=options))


def _start_refused(checks: Checks, processes: Processes) -> list[Process]:
    arguments = _arguments(checks, checks.scratch / "refused", {"exact__shards": 0, "engine__name": "fsdp"})
    return processes.start_ranks("refused", 2, "distributed.train", *arguments)


def _check_refused(ranks: list[Process]) -> None:
    codes = [rank.wait() for rank in ranks]
    assert codes == [ExitCode.BAD_INPUT] * 2, f"exit codes {codes}\n{ranks[0].text[-1500:]}"
    for rank in ranks:
        assert "Traceback" not in rank.text, rank.text[-1500:]
    messages = [line for line in ranks[0].text.splitlines() if "fsdp" in line]
    assert len(messages) == 1, f"{len(messages)} lines name fsdp:\n{ranks[0].text[-1500:]}"


def _check_groups(checks: Checks, groups: dict[int, list[Process]]) -> None:
    for world_size, ranks in sorted(groups.items()):
        with checks.check(f"{world_size} rank{'s' if world_size > 1 else ''}: every run finished"):
            for rank in ranks:
                rank.succeed()


def _check_exact(checks: Checks, case: _Case) -> None:
    alone = case.run(checks, 1)
    for world_size in case.world_sizes[1:]:
        name = f"{case.name.replace('-', ' mode, ')}: {world_size} ranks, bit-identical to one process"
        with checks.check(name) as figures:
            figures["tensors"] = runs.assert_same_bits(case.run(checks, world_size), alone)
            figures["steps"] = runs.step_logged(alone)


def _check_fast(checks: Checks) -> None:
    for world_size in FLOAT64.world_sizes[1:]:
        with checks.check(f"fast mode, float64: {world_size} ranks agree with one process") as figures:
            runs.assert_finished(FLOAT64.run(checks, world_size))
            ours, alone = (runs.training_steps(FLOAT64.run(checks, size)) for size in (world_size, 1))
            assert len(ours) == len(alone) > 1
            figures["steps"] = len(alone)
            for name in ("loss", "grad_norm"):
                worst = max(abs(a[name] / b[name] - 1) for a, b in zip(ours, alone, strict=True))
                figures[f"largest relative difference of {name}"] = worst
                assert worst < 1e-10, f"{name} differs by {worst}"
    with checks.check("fast mode, float16 with loss scaling, 2 ranks") as figures:
        run = FLOAT16.run(checks, 2)
        runs.assert_finished(run)
        steps = runs.training_steps(run)
        figures["losses"] = [steps[0]["loss"], steps[-1]["loss"]]
        figures["skipped_steps"] = sum(line["skipped_steps"] for line in steps)
        assert all(math.isfinite(line["loss"]) for line in steps)
        assert figures["skipped_steps"] < len(steps) / 2
        assert "scaler.scale" in runs.saved_digests(run)
