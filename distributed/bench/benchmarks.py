"""The benchmarks: the workloads each runs in a round, the figures it derives from a measurement, and the ratios of figures."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from distributed.bench import scaling, training_speed
from distributed.bench.measure import mean_step_seconds, typical_step_seconds
from distributed.bench.options import NETWORK, Options
from distributed.bench.peers import PEERS
from distributed.bench.workload import Measurement, Workload

Figures = dict[str, float]
"""A round's figures by name: the workload's name, followed by the quantity unless it is the benchmark's main figure."""
Workloads = dict[str, Workload]


class Benchmark(NamedTuple):
    """A benchmark.

    Args:
        workloads: returns what to run, by name, given the options and a folder for runs.
        figures_of: returns the figures of one workload, given its name and its measurement.
        ratios_of: returns ratios of a round's figures, in which workloads that failed are missing.
        unit: unit of the main figure.
        notes: what to print beside the figures whose name starts with the key.
    """

    workloads: Callable[[Options, str], Workloads]
    figures_of: Callable[[str, Workload, Measurement], Figures]
    ratios_of: Callable[[Figures], Figures]
    unit: str
    notes: Mapping[str, str] = MappingProxyType({})


def _images_per_second(name: str, workload: Workload, measured: Measurement) -> Figures:
    return {name: workload.batch / typical_step_seconds(measured.readings, workload.device)}


def _milliseconds(name: str, workload: Workload, measured: Measurement) -> Figures:
    return {name: 1000 * typical_step_seconds(measured.readings, workload.device)}


# Exact mode at several numbers of shards, and fast mode

_FAST = "fast (plain on one process, else with synchronized batch norm)"
_MEMORY = ", memory per process [MiB]"


def _exact(options: Options, folder: str) -> Workloads:
    found = {}
    if options.network == NETWORK:
        found["compute alone"] = training_speed.compute_alone(options)
    for layout, (ranks, threads) in training_speed.layouts(options).items():
        for mode, shards in {_FAST: 0, **{f"exact, {n} shards": n for n in (2, 4, 8) if n >= ranks}}.items():
            settings = ("--model.name", options.network, "--exact.shards", str(shards))
            found[f"{layout}: {mode}"] = training_speed.ours(
                options, f"{folder}/{ranks}-{shards}", *settings, ranks=ranks, threads=threads
            )
    return found


def _milliseconds_and_memory(name: str, workload: Workload, measured: Measurement) -> Figures:
    return _milliseconds(name, workload, measured) | {f"{name}{_MEMORY}": measured.memory_mib}


def _exact_ratios(figures: Figures) -> Figures:
    ratios = {}
    for name, value in figures.items():
        if ": exact" in name and not name.endswith(_MEMORY):
            layout = name.partition(": ")[0]
            if fast := figures.get(f"{layout}: {_FAST}"):
                ratios[f"{name} / fast"] = value / fast
            if name.endswith("8 shards") and layout.startswith("1 ") and "compute alone" in figures:
                ratios[f"{name} / compute alone"] = value / figures["compute alone"]
    one, two = "1 process x 2 threads", "2 processes x 1 thread"
    for mode, label in ((_FAST, "fast"), ("exact, 2 shards", "exact, 2 shards")):
        if {f"{one}: {mode}", f"{two}: {mode}"} <= figures.keys():
            ratios[f"{two}: {label}, speed relative to {one}"] = figures[f"{one}: {mode}"] / figures[f"{two}: {mode}"]
    return ratios


# Time to the first step and to a process group alone, on two processes each


def _startup(options: Options, folder: str) -> Workloads:
    process_group_alone = f"{training_speed.MODULES}.components:process_group_alone"
    return {
        "to the first step": training_speed.ours(options, folder, ranks=2, threads=1, steps=1),
        "to a process group": Workload(process_group_alone, {}, steps=1, ranks=2),
    }


def _seconds_to_first_step(name: str, _: Workload, measured: Measurement) -> Figures:
    return {name: measured.readings[0][1] - measured.start}


def _startup_ratios(figures: Figures) -> Figures:
    if len(figures) < 2:
        return {}
    return {"first step / process group alone": figures["to the first step"] / figures["to a process group"]}


# Training with a save every 20 steps, and without

_SAVE_EVERY = 20


def _save(options: Options, folder: str) -> Workloads:
    return {
        name: training_speed.ours(
            options, f"{folder}/{every}", "--checkpoint.every_steps", str(every),
            ranks=2, threads=1, steps=2 * options.steps,
        )
        for name, every in (("mean step with saves", _SAVE_EVERY), ("mean step without", 0))
    }  # fmt: skip


def _mean_seconds(name: str, _: Workload, measured: Measurement) -> Figures:
    return {name: mean_step_seconds(measured.readings)}


def _save_ratios(figures: Figures) -> Figures:
    if len(figures) < 2:
        return {}
    added = _SAVE_EVERY * (figures["mean step with saves"] - figures["mean step without"])
    return {"time a save adds / a step": added / figures["mean step without"]}


# Every engine on two processes

_ENGINES = {
    "ddp, fast": ("--exact.shards", "0"),
    "ddp, exact, 2 shards": ("--exact.shards", "2"),
    "fsdp, fast (FSDP2)": ("--engine.name", "fsdp", "--exact.shards", "0"),
    "fsdp, exact, 2 shards": ("--engine.name", "fsdp", "--exact.shards", "2"),
    "fsdp, exact, 8 shards": ("--engine.name", "fsdp", "--exact.shards", "8"),
    **{f"deepspeed, stage {n}": ("--engine.name", "deepspeed", "--engine.zero_stage", str(n)) for n in range(4)},
}


def _engines(options: Options, folder: str) -> Workloads:
    return {
        name: training_speed.ours(options, f"{folder}/{number}", *settings, ranks=2, threads=1)
        for number, (name, settings) in enumerate(_ENGINES.items())
    }


def _engines_ratios(figures: Figures) -> Figures:
    first = next(iter(_ENGINES))
    return {
        f"{name} / {first}": value / figures[first]
        for name, value in figures.items()
        if name != first and first in figures
    }


# Local response norm on [128, 96, 28, 28] images, forward and backward: torch's layer and this project's

_PRECISIONS = ("float32", "bfloat16")


def _norm(options: Options, _: str) -> Workloads:
    return {
        f"{layer}, {precision}": Workload(
            f"{training_speed.MODULES}.components:local_response_norm",
            {"layer": layer, "precision": precision, "device": options.device},
            options.steps, options.device, options.block,
        )
        for precision in _PRECISIONS
        for layer in ("torch's", "ours")
    }  # fmt: skip


def _norm_ratios(figures: Figures) -> Figures:
    return {
        f"torch's / ours, {precision}": figures[f"torch's, {precision}"] / figures[f"ours, {precision}"]
        for precision in _PRECISIONS
        if {f"torch's, {precision}", f"ours, {precision}"} <= figures.keys()
    }


BENCHMARKS = {
    "train": Benchmark(
        training_speed.workloads,
        _images_per_second,
        training_speed.ratios,
        "images/s",
        {training_speed.PEER_NAMES[key]: ", ".join(peer.lacks) for key, peer in PEERS.items()},
    ),
    "exact": Benchmark(_exact, _milliseconds_and_memory, _exact_ratios, "ms"),
    "scaling": Benchmark(scaling.workloads, scaling.figures_of, scaling.ratios, "ms"),
    "startup": Benchmark(_startup, _seconds_to_first_step, _startup_ratios, "s"),
    "save": Benchmark(_save, _mean_seconds, _save_ratios, "s"),
    "engines": Benchmark(_engines, _milliseconds, _engines_ratios, "ms"),
    "norm": Benchmark(_norm, _milliseconds, _norm_ratios, "ms"),
}
