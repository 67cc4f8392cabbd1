"""What each benchmark runs in a round, which figures it takes, and the ratios of them."""

from collections.abc import Callable
from typing import NamedTuple

from distributed.bench import train
from distributed.bench.options import Options
from distributed.bench.rounds import Contender, Measured, median_step_seconds

Round = dict[str, float]
Contenders = dict[str, Contender]


def _images_a_second(name: str, contender: Contender, measured: Measured) -> Round:
    return {name: contender.batch / median_step_seconds(measured.readings)}


def _milliseconds(name: str, _: Contender, measured: Measured) -> Round:
    return {name: 1000 * median_step_seconds(measured.readings)}


_FAST = "fast (plain on one process, else with synchronized batch norm)"
_MEMORY = ", memory a process [MiB]"


def _exact(options: Options, folder: str) -> Contenders:
    """Exact mode at several numbers of shards beside fast mode."""
    found = {"compute alone": train.compute_alone(options)}
    for where, (ranks, threads) in train.layouts(options).items():
        for name, shards in {_FAST: 0, **{f"exact, S = {n}": n for n in (2, 4, 8)}}.items():
            more = ("--exact.shards", str(shards))
            found[f"{where}: {name}"] = train.ours(
                options, f"{folder}/{ranks}-{shards}", *more, ranks=ranks, threads=threads
            )
    return found


def _milliseconds_and_memory(name: str, contender: Contender, measured: Measured) -> Round:
    return _milliseconds(name, contender, measured) | {f"{name}{_MEMORY}": measured.memory_mib}


def _exact_ratios(r: Round) -> Round:
    ratios = {}
    for name, value in r.items():
        if ": exact" in name and not name.endswith(_MEMORY):
            where = name.partition(": ")[0]
            if base := r.get(f"{where}: {_FAST}"):
                ratios[f"{name} / fast"] = value / base
            if name.endswith("S = 8") and where.startswith("1 ") and "compute alone" in r:
                ratios[f"{name} / compute alone"] = value / r["compute alone"]
    return ratios


def _startup(options: Options, folder: str) -> Contenders:
    """To the first step, and to a process group alone; two processes each."""
    return {
        "to the first step": train.ours(options, folder, ranks=2, threads=1, steps=1),
        "to a process group": Contender("distributed.bench.contenders:process_group_alone", {}, steps=1, ranks=2),
    }


def _seconds_to_the_first(name: str, _: Contender, measured: Measured) -> Round:
    return {name: measured.readings[0][1] - measured.start}


def _startup_ratios(r: Round) -> Round:
    if len(r) < 2:
        return {}
    return {"first step / process group alone": r["to the first step"] / r["to a process group"]}


_SAVE_EVERY = 20


def _save(options: Options, folder: str) -> Contenders:
    """Training with a save every 20 steps, and without."""
    return {
        name: train.ours(
            options, f"{folder}/{every}", "--checkpoint.every_steps", str(every),
            ranks=2, threads=1, steps=2 * options.steps,
        )
        for name, every in (("mean step with saves", _SAVE_EVERY), ("mean step without", 0))
    }  # fmt: skip


def _mean_seconds(name: str, _: Contender, measured: Measured) -> Round:
    (first, start), (last, end) = measured.readings[len(measured.readings) // 8], measured.readings[-1]
    return {name: (end - start) / (last - first)}


def _save_ratios(r: Round) -> Round:
    if len(r) < 2:
        return {}
    added = _SAVE_EVERY * (r["mean step with saves"] - r["mean step without"])
    return {"time a save adds / a step": added / r["mean step without"]}


def _norm(options: Options, _: str) -> Contenders:
    """Local response norm forward and backward on 128 x 96 x 28 x 28, torch's layer and ours."""
    return {
        f"{layer}, {precision}": Contender(
            "distributed.bench.contenders:local_response_norm",
            {"layer": layer, "precision": precision, "device": options.device},
            options.steps, options.device, options.block(128),
        )
        for precision in ("float32", "bfloat16")
        for layer in ("torch's", "ours")
    }  # fmt: skip


def _norm_ratios(r: Round) -> Round:
    return {
        f"torch's / ours, {precision}": r[f"torch's, {precision}"] / r[f"ours, {precision}"]
        for precision in ("float32", "bfloat16")
        if {f"torch's, {precision}", f"ours, {precision}"} <= r.keys()
    }


_ENGINES = {
    "ddp, fast": ("--exact.shards", "0"),
    "ddp, exact, S = 2": ("--exact.shards", "2"),
    "fsdp, fast (FSDP2)": ("--engine.name", "fsdp", "--exact.shards", "0"),
    "fsdp, exact, S = 2": ("--engine.name", "fsdp", "--exact.shards", "2"),
    "fsdp, exact, S = 8": ("--engine.name", "fsdp", "--exact.shards", "8"),
    **{f"deepspeed, stage {n}": ("--engine.name", "deepspeed", "--engine.zero_stage", str(n)) for n in range(4)},
}


def _engines(options: Options, folder: str) -> Contenders:
    """Every engine on two processes."""
    return {
        name: train.ours(options, f"{folder}/{number}", *settings, ranks=2, threads=1)
        for number, (name, settings) in enumerate(_ENGINES.items())
    }


def _engines_ratios(r: Round) -> Round:
    first = next(iter(_ENGINES))
    return {f"{name} / {first}": value / r[first] for name, value in r.items() if name != first and first in r}


class Kind(NamedTuple):
    """A benchmark.

    Args:
        contenders: what to run, by name, from the options and a folder for runs.
        figures_of: the figures of one contender, from its name and what was measured.
        ratios_of: ratios of a round's figures; contenders that failed are missing there.
        unit: of the figures.
    """

    contenders: Callable[[Options, str], Contenders]
    figures_of: Callable[[str, Contender, Measured], Round]
    ratios_of: Callable[[Round], Round]
    unit: str


KINDS = {
    "train": Kind(train.contenders, _images_a_second, train.ratios, "images/s"),
    "exact": Kind(_exact, _milliseconds_and_memory, _exact_ratios, "ms"),
    "startup": Kind(_startup, _seconds_to_the_first, _startup_ratios, "s"),
    "save": Kind(_save, _mean_seconds, _save_ratios, "s"),
    "engines": Kind(_engines, _milliseconds, _engines_ratios, "ms"),
    "norm": Kind(_norm, _milliseconds, _norm_ratios, "ms"),
}
