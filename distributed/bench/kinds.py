"""What each benchmark runs in a round, and the ratios that are taken of it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distributed.bench.rounds import Contender, median_step_seconds

Round = dict[str, float]
BATCH = 128


def _ours(steps: int, root: Path, folder: str, threads: int, *more: str) -> dict[str, Any]:
    settings = ["--epochs", "20", "--global_batch_size", str(BATCH), "--data.validation_fraction", "0"]
    where = [
        "--data.name",
        "cifar10",
        "--data.root",
        str(root),
        "--run_dir",
        f"{folder}/run",
        "--threads",
        str(threads),
    ]
    return {"steps": steps, "arguments": [*settings, *where, *more]}


def _train_round(root: Path, steps: int) -> Round:
    """Images a second of the seeds' plain loop, of compute alone, and of ours on one and on two processes."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "seeds' plain loop": Contender("seed_loop", {"root": str(root), "steps": steps, "threads": 2}),
            "compute alone": Contender("compute_alone", {"steps": steps, "threads": 2}),
        }
        for mode, shards in (("fast", "0"), ("exact, 8 shards", "8")):
            for ranks, threads, where in ((0, 2, "1 process x 2 threads"), (2, 1, "2 processes x 1 thread")):
                arguments = _ours(steps, root, f"{folder}/{mode}{ranks}", threads, "--exact.shards", shards)
                contenders[f"ours ({mode}), {where}"] = Contender("ours", arguments, ranks=ranks)
        skip = steps // 4
        return {name: BATCH / median_step_seconds(c.measure().clock, skip=skip) for name, c in contenders.items()}


def _train_ratios(r: Round) -> Round:
    ours = {name.removeprefix("ours "): value for name, value in r.items() if name.startswith("ours ")}
    others = ("seeds' plain loop", "compute alone")
    return {f"ours {name} / {other}": value / r[other] for name, value in ours.items() for other in others}


_PLAIN = "1 process x 2 threads: fast (BatchNorm2d)"
_FAST = "2 processes x 1 thread: fast (synchronized batch norm)"
_MEMORY = ", memory a process [MiB]"


def _exact_round(root: Path, steps: int) -> Round:
    """Milliseconds a step and memory of exact mode and of fast mode."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "compute alone": Contender("compute_alone", {"steps": steps, "threads": 2}),
            _PLAIN: Contender("ours", _ours(steps, root, f"{folder}/plain", 2, "--exact.shards", "0")),
            _FAST: Contender("ours", _ours(steps, root, f"{folder}/fast", 1, "--exact.shards", "0"), ranks=2),
        }
        for shards in (2, 4, 8):
            one = _ours(steps, root, f"{folder}/one{shards}", 2, "--exact.shards", str(shards))
            two = _ours(steps, root, f"{folder}/two{shards}", 1, "--exact.shards", str(shards))
            contenders[f"1 process x 2 threads: exact, S = {shards}"] = Contender("ours", one)
            contenders[f"2 processes x 1 thread: exact, S = {shards}"] = Contender("ours", two, ranks=2)
        for name, contender in contenders.items():
            measured = contender.measure()
            found[name] = 1000 * median_step_seconds(measured.clock, skip=steps // 4)
            found[f"{name}{_MEMORY}"] = measured.memory_mib
    return found


def _exact_ratios(r: Round) -> Round:
    ratios = {}
    for name, value in r.items():
        if "exact" in name and not name.endswith(_MEMORY):
            base = _PLAIN if "1 process" in name else _FAST
            ratios[f"{name} / {base.partition(': ')[2]}"] = value / r[base]
            if "S = 8" in name and "1 process" in name:
                ratios[f"{name} / compute alone"] = value / r["compute alone"]
    return ratios


def _startup_round(root: Path, _: int) -> Round:
    """Seconds from launch to the first step, and to a process group alone; two processes each."""
    with tempfile.TemporaryDirectory() as folder:
        first_step = Contender("ours", _ours(1, root, folder, 1), ranks=2)
        alone = Contender("process_group_alone", {}, ranks=2)
        seconds = {}
        for name, contender in (("to the first step", first_step), ("to a process group", alone)):
            measured = contender.measure()
            seconds[name] = measured.clock[0] - measured.start
        return seconds


def _startup_ratios(r: Round) -> Round:
    return {"first step / process group alone": r["to the first step"] / r["to a process group"]}


def _save_round(root: Path, steps: int) -> Round:
    """Seconds that a save adds to training: the mean step with a save every 20 steps against that without."""
    every, skip = 20, 20
    found = {}
    for name, save in (("mean step with saves", every), ("mean step without", 0)):
        with tempfile.TemporaryDirectory() as folder:
            saving = ["--checkpoint.every_steps", str(save), "--checkpoint.every_minutes", "0"]
            clock = Contender("ours", _ours(steps * 2, root, folder, 1, *saving), ranks=2).measure().clock
            found[name] = (clock[-1] - clock[skip]) / (len(clock) - 1 - skip)
    return found


def _save_ratios(r: Round) -> Round:
    added = 20 * (r["mean step with saves"] - r["mean step without"])
    return {"time a save adds / a step": added / r["mean step without"]}


def _norm_round(_: Path, steps: int) -> Round:
    """Milliseconds of local response norm forward and backward on 128 x 96 x 28 x 28, torch's layer and ours."""
    layers = [(layer, precision) for precision in ("float32", "bfloat16") for layer in ("torch's", "ours")]
    contenders = {
        f"{layer}, {precision}": Contender(
            "local_response_norm", {"layer": layer, "precision": precision, "steps": steps}
        )
        for layer, precision in layers
    }
    return {
        name: 1000 * median_step_seconds(contender.measure().clock, skip=steps // 4)
        for name, contender in contenders.items()
    }


def _norm_ratios(r: Round) -> Round:
    return {
        f"torch's / ours, {precision}": r[f"torch's, {precision}"] / r[f"ours, {precision}"]
        for precision in ("float32", "bfloat16")
    }


_ENGINES = {
    "ddp, fast": ("--exact.shards", "0"),
    "ddp, exact, S = 2": ("--exact.shards", "2"),
    "fsdp, fast (FSDP2)": ("--engine.name", "fsdp", "--exact.shards", "0"),
    "fsdp, exact, S = 2": ("--engine.name", "fsdp", "--exact.shards", "2"),
    "fsdp, exact, S = 8": ("--engine.name", "fsdp", "--exact.shards", "8"),
    **{f"deepspeed, stage {n}": ("--engine.name", "deepspeed", "--engine.zero_stage", str(n)) for n in range(4)},
}


def _engines_round(root: Path, steps: int) -> Round:
    """Milliseconds a step of every engine on two processes."""
    found = {}
    for name, settings in _ENGINES.items():
        with tempfile.TemporaryDirectory() as folder:
            clock = Contender("ours", _ours(steps, root, folder, 1, *settings), ranks=2).measure().clock
            found[name] = 1000 * median_step_seconds(clock, skip=steps // 4)
    return found


def _engines_ratios(r: Round) -> Round:
    first = next(iter(_ENGINES))
    return {f"{name} / {first}": value / r[first] for name, value in r.items() if name != first}


class Kind(NamedTuple):
    """A benchmark: its rounds, (CIFAR-10's folder, steps) -> figures; the ratios of a round; the figures' unit."""

    measure: Callable[[Path, int], Round]
    ratios_of: Callable[[Round], Round]
    unit: str


KINDS = {
    "train": Kind(_train_round, _train_ratios, "images/s"),
    "exact": Kind(_exact_round, _exact_ratios, "ms"),
    "startup": Kind(_startup_round, _startup_ratios, "s"),
    "save": Kind(_save_round, _save_ratios, "s"),
    "engines": Kind(_engines_round, _engines_ratios, "ms"),
    "norm": Kind(_norm_round, _norm_ratios, "ms"),
}
