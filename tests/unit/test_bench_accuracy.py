"""Time to accuracy: curves, files, the config as timm's arguments, and the block of docs/benchmarks.md."""

import json
import os
import sys
from dataclasses import asdict

import pytest

from distributed.bench import epoch_clock, timm_settings
from distributed.bench.__main__ import main
from distributed.bench.accuracy import report
from distributed.bench.accuracy_results import Results, Run, Spread, seconds_to, summary
from distributed.bench.epoch_clock import EpochClock
from distributed.bench.machine import machine
from distributed.bench.page_accuracy import accuracy
from distributed.config import load_config
from distributed.errors import InputError
from distributed.optim import muon

MACHINE = {
    "date": "2026-12-01", "processor": "CPU", "instructions": "avx", "cores": 2, "git": "abc",
    "versions": {"torch": "2.14.1", "timm": "1.0.31"},
}  # fmt: skip
SETTINGS = {
    "epochs": 3, "global_batch_size": 64, "precision": "bfloat16", "model": {"name": "fast_alexnet"},
    "data": {"name": "cifar10"}, "optim": {"name": "sgd", "lr": 0.1},
}  # fmt: skip
GOOD, POOR = [[10.0, 0.8], [20.0, 0.95], [30.0, 0.93]], [[12.0, 0.5], [24.0, 0.85], [36.0, 0.89]]
MUON = load_config(
    optim={"name": "muon", "lr": 0.2, "momentum": 0.6, "adamw_lr": 0.01, "beta2": 0.98, "bias_lr_factor": 2.0}
).optim.model_dump()
OTHERS = "--config, --seeds, --epochs and --processes: apply to accuracy only, not to norm"
DIMS = {"first.bias": 1, "blocks.weight": 4, "norm.bias": 1, "head.weight": 2, "head.bias": 1}


def run_of(seed, side, curve, date="2026-12-01", git="abc"):
    return Run.of(seed, side, date, curve, git)


def results_of(*runs, machine=MACHINE, settings=SETTINGS):
    return Results("python -m distributed.bench accuracy", machine, settings, ["Flips are random."], [*runs])


# Curves


def test_an_accuracy_is_reached_by_the_first_epoch_with_it():
    assert [seconds_to(GOOD, percent) for percent in (80, 90, 94)] == [10.0, 20.0, 20.0]
    assert [seconds_to(POOR, percent) for percent in (80, 90, 94)] == [24.0, None, None]


def test_a_percentage_is_reached_exactly():
    for percent in (80, 90, 94):
        assert seconds_to([[1.0, percent * 100 / 10_000]], percent) == 1.0
        assert seconds_to([[1.0, (percent * 100 - 1) / 10_000]], percent) is None


def test_seeds_that_reached_nothing_are_counted_not_averaged():
    found = summary([run_of(0, "ours", GOOD), run_of(1, "ours", POOR), run_of(0, "timm", POOR)])
    assert found["ours"]["seconds to 80 %"] == Spread(17.0, pytest.approx(9.899, abs=1e-3), 2, 2)
    assert found["ours"]["seconds to 90 %"] == Spread(20.0, None, 1, 2)
    assert found["timm"]["seconds to 90 %"] == Spread(None, None, 0, 1)
    assert found["ours"]["final accuracy"].mean == pytest.approx(0.91)


def test_time_between_epochs_is_not_counted(monkeypatch):
    times = iter([10, 11, 13, 50, 54])  # start, step, step; start, step; none before
    monkeypatch.setattr(epoch_clock.time, "monotonic", lambda: next(times))
    clock = EpochClock("cpu")
    clock.start()
    clock.step()
    clock.step()
    clock.end_epoch(0.5)
    clock.start()
    clock.step()
    clock.end_epoch(0.6)
    assert clock.curve == [(3, 0.5), (7, 0.6)]


# Files


def test_a_file_continues_with_its_runs(tmp_path):
    file = tmp_path / "accuracy.json"
    results_of(run_of(1, "ours", GOOD), run_of(0, "timm", POOR), run_of(0, "ours", GOOD)).write(file)
    resumed = results_of(machine=MACHINE | {"date": "2026-12-02", "git": "def"})
    resumed.resume(file)
    assert [(run.seed, run.side) for run in resumed.runs] == [(0, "ours"), (0, "timm"), (1, "ours")]
    assert resumed.has("timm", 0)
    assert not resumed.has("timm", 1)
    resumed.write(file)
    content = json.loads(file.read_text())
    assert content["runs"][1] == asdict(run_of(0, "timm", POOR))
    assert content["summary"]["ours"]["seconds to 94 %"] == {"mean": 20.0, "deviation": 0.0, "found": 2, "seeds": 2}


def test_a_file_that_does_not_exist_has_no_runs(tmp_path):
    results = results_of()
    results.resume(tmp_path / "none.json")
    assert results.runs == []


@pytest.mark.timeout(10)
def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    results = results_of()
    results.resume(tmp_path / "pipe")
    assert results.runs == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": SETTINGS | {"epochs": 9}}, r"has runs with settings\.epochs = 3, not 9;"),
        ({"settings": SETTINGS | {"optim": {"name": "sgd", "lr": 0.2}}}, r"with settings\.optim\.lr = 0\.1, not 0\.2;"),
        ({"machine": MACHINE | {"cores": 4}}, r"has runs with machine\.cores = 2, not 4;"),
        ({"machine": MACHINE | {"instructions": "avx2"}}, r"with machine\.instructions = avx, not avx2;"),
    ],
)  # fmt: skip
def test_runs_under_other_conditions_are_not_mixed(change, reason, tmp_path):
    file = tmp_path / "accuracy.json"
    results_of(run_of(0, "ours", GOOD)).write(file)
    with pytest.raises(InputError, match=reason):
        results_of(**change).resume(file)


def test_runs_without_a_commit_are_read(tmp_path):
    file = tmp_path / "accuracy.json"
    results_of(run_of(0, "ours", GOOD)).write(file)
    file.write_text(file.read_text().replace(',\n   "git": "abc"', ""))
    resumed = results_of()
    resumed.resume(file)
    assert [run.git for run in resumed.runs] == [""]


@pytest.mark.parametrize("text", ["", "[]", '{"rounds": []}', '{"runs": [{"seed": 0}], "settings": {}, "machine": {}}'])
def test_another_kind_of_file_is_refused(text, tmp_path):
    file = tmp_path / "accuracy.json"
    file.write_text(text)
    with pytest.raises(InputError, match="is not a file of bench accuracy; name another file"):
        results_of().resume(file)


# timm's arguments


def test_sgd_and_adamw_have_their_settings_in_timm():
    sgd = load_config(optim={"name": "sgd", "momentum": 0.8}).optim.model_dump()
    assert timm_settings.optimizer_arguments(sgd) == {"opt": "sgd", "momentum": 0.8}
    assert timm_settings.optimizer_arguments(sgd | {"nesterov": False})["opt"] == "momentum"
    adamw = load_config(optim={"name": "adamw", "beta2": 0.95}).optim.model_dump()
    assert timm_settings.optimizer_arguments(adamw) == {"opt": "adamw", "betas": (0.9, 0.95), "eps": 1e-8}


def test_muon_has_its_settings_in_timm():
    found = timm_settings.optimizer_arguments(MUON)
    assert found["opt"] == "muon"
    assert (found["momentum"], found["betas"]) == (0.6, (0.9, 0.98))
    assert (found["ns_steps"], found["ns_coefficients"]) == (muon._ITERATIONS, "original")


def test_an_optimizer_that_timm_lacks_is_refused():
    with pytest.raises(InputError, match=r"^optim\.name = shampoo: has no counterpart .*: --no-peers$"):
        timm_settings.optimizer_arguments({"name": "shampoo"})


def test_weights_decay_and_biases_do_not():
    sgd = load_config(optim={"name": "sgd", "weight_decay": 0.01}).optim.model_dump()
    weights, others = timm_settings.parameter_groups(sgd, DIMS)
    assert weights == {"params": ["blocks.weight", "head.weight"], "weight_decay": 0.01}
    assert others == {"params": ["first.bias", "norm.bias", "head.bias"], "weight_decay": 0.0, "lr_scale": 1.0}
    _, others = timm_settings.parameter_groups(sgd | {"decay_norm_and_bias": True, "bias_lr_factor": 3.0}, DIMS)
    assert (others["weight_decay"], others["lr_scale"]) == (0.01, 3.0)


def test_muon_leaves_biases_and_the_last_layer_to_adamw():
    filters, last, others = timm_settings.parameter_groups(MUON, DIMS)
    assert (filters["params"], filters["use_muon"], filters["nesterov"]) == (["blocks.weight"], True, True)
    assert (last["params"], last["use_fallback"], last["weight_decay"]) == (["head.weight"], True, 0.1)
    assert (others["params"], others["weight_decay"]) == (["first.bias", "norm.bias", "head.bias"], 0.0)
    assert (last["lr_scale"], others["lr_scale"]) == (pytest.approx(0.05), pytest.approx(0.1))


def test_a_schedule_spans_the_same_epochs_in_timm():
    def arguments(**schedule):
        return timm_settings.schedule_arguments(load_config(epochs=8, optim={"lr": 0.4}, schedule=schedule), 50)

    cycle = arguments(name="one_cycle", warmup_fraction=0.25, start_factor=0.1, final_factor=0.01)
    assert (cycle["sched"], cycle["warmup_epochs"], cycle["num_epochs"]) == ("cosine", 2.0, 6.0)
    assert (cycle["warmup_lr"], cycle["min_lr"]) == (pytest.approx(0.04), pytest.approx(0.004))
    cosine = arguments(name="cosine", warmup_epochs=1)
    assert (cosine["num_epochs"], cosine["warmup_lr"], cosine["min_lr"]) == (7, pytest.approx(0.4 / 50), 0)
    linear = arguments(name="linear", final_factor=0.1)
    assert (linear["sched"], linear["decay_rate"], linear["min_lr"]) == ("poly", 1, pytest.approx(0.04))
    constant = arguments(name="constant")
    assert (constant["sched"], constant["num_epochs"], constant["warmup_epochs"]) == ("constant", 8, 0)


def test_every_setting_without_a_counterpart_is_named():
    config = load_config(
        schedule={"name": "plateau"}, data={"augment": {"mixup": 0.2}}, precision="float16", grad_accum_steps=2
    )
    with pytest.raises(InputError) as raised:
        timm_settings.check(config)
    settings = [line.partition(": has no counterpart")[0] for line in str(raised.value).splitlines()]
    assert settings == [
        "schedule.name = plateau", "precision = float16", "grad_accum_steps = 2", "data.augment.mixup = 0.2",
    ]  # fmt: skip
    for setting in ({"compile": True}, {"grad_checkpointing": {"enabled": True}}):
        with pytest.raises(InputError, match=r"^(compile|grad_checkpointing\.enabled) = true: has no counterpart"):
            timm_settings.check(load_config(**setting, precision="bfloat16"))
    for shipped in ("cifar10", "cifar10_fast"):
        timm_settings.check(load_config(shipped, precision="bfloat16"))


def test_what_timm_does_otherwise_depends_on_the_config():
    plain = timm_settings.differences(load_config(schedule={"name": "cosine"}))
    assert [line.partition(":")[0] for line in plain] == [
        "No exact mode", "Incomplete last batches of an epoch are dropped, as by timm's loader.",
    ]  # fmt: skip
    modern = load_config(data={"augment": {"flip": "alternating"}}, evaluation={"flip_tta": True})
    assert len(timm_settings.differences(modern)) == 5
    for precision in ("float32", "bfloat16"):
        muon = timm_settings.differences(load_config(optim={"name": "muon"}, precision=precision))
        assert any(line.startswith("timm's Muon") for line in muon) == (precision == "float32")


@pytest.mark.parametrize(
    ("fraction", "batch", "are_dropped"),
    [(0.0, 500, False), (0.0, 128, True), (0.2, 500, False), (0.2, 128, True), (0.2, 80, False), (0.0, 80, False)],
)
def test_only_incomplete_batches_are_dropped(fraction, batch, are_dropped):
    for name in ("cifar10", "generated100"):
        config = load_config(data={"name": name, "validation_fraction": fraction}, global_batch_size=batch)
        found = timm_settings.differences(config)
        assert any(line.startswith("Incomplete last batches") for line in found) == are_dropped


# The page and the command


def test_the_page_says_that_nothing_was_run():
    assert accuracy({}) == accuracy({"bench_accuracy_cpu": {"runs": []}}) == "Not run yet."


def test_the_page_has_means_and_what_was_not_reached(tmp_path):
    file = tmp_path / "accuracy.json"
    last = run_of(0, "timm", POOR, date="2026-12-03")
    results_of(run_of(0, "ours", GOOD), run_of(1, "ours", POOR), last).write(file)
    block = accuracy({"bench_accuracy_cpu": json.loads(file.read_text())})
    assert "fast_alexnet, cifar10, 3 epochs, batch 64, sgd, bfloat16" in " ".join(block.split())
    assert "torch 2.14.1, timm 1.0.31, 2026-12-01 to 2026-12-03, `python" in " ".join(block.split())
    rows = [line for line in block.splitlines() if line.startswith("|")]
    assert rows == [
        "| | ours, 2 seeds | timm, 1 seed |",
        "|---|---|---|",
        "| seconds to 80 % | 17.0 ± 9.9 | 24.0 |",
        "| seconds to 90 % | 20.0 (1 of 2 seeds) | not reached |",
        "| seconds to 94 % | 20.0 (1 of 2 seeds) | not reached |",
        "| seconds in all | 33.0 ± 4.2 | 36.0 |",
        "| final accuracy | 91.00 ± 2.83 % | 89.00 % |",
    ]
    assert block.endswith("On timm's side: Flips are random.")


def test_the_table_names_several_commits():
    runs = [run_of(0, "ours", GOOD), run_of(0, "timm", GOOD), run_of(1, "ours", GOOD, git="def+changes")]
    assert report(runs).endswith("|\n\nThe runs are of several commits: abc and def+changes.")
    assert report(runs[:2]).endswith("|")


def test_the_machine_tells_processors_apart():
    assert {"processor", "processor_model", "instructions"} <= machine().keys()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("accuracy", "--rounds", "2"), "--rounds and --steps: do not apply to accuracy; use --seeds and --epochs"),
        (("accuracy", "--processes", "0"), "--processes 0: must be at least 1"),
        (("accuracy", "--processes", "3"), "--processes 3: timm has 2 threads; use at most 2, or --no-peers"),
        (
            ("accuracy", "--processes", "16", "--no-peers"),
            "exact.shards = 8 (auto) is less than the 16 processes: start at most 8, or a new run with exact.shards = 16, or 0 "
            "for fast mode",
        ),
        (("accuracy", "--seeds", "0", "-1"), "--seeds -1: each must be at least 0"),
        (("norm", "--epochs", "3"), OTHERS),
        (("accuracy", "--config", "cifar10", "--epochs", "0"), "command line: epochs = 0: should be greater than 0"),
    ],
)
def test_invalid_arguments_are_one_line(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--device", "cpu"])
    assert main() == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
