import json
import math
import pkgutil
import sys
import threading
import time
from pathlib import Path

import pytest
from kit.speed import slowness

from distributed.bench import scaling
from distributed.bench.__main__ import main
from distributed.bench.options import Options
from distributed.bench.phases import EXCHANGES, WAITS, PhaseClock, StepTimes, typical_step
from distributed.bench.scaling_model import Point, StepModel, busiest_images, fit
from distributed.bench.scaling_report import report
from distributed.bench.workload import Workload

MODEL = StepModel(exact=False, fixed=10, per_image=0.5, exchange=2, per_peer=0.25, synchronizing=4, sharing=3)


def point(processes, cores=2, model=MODEL):
    exchange = (model.exchange + model.per_peer * (processes - 1)) if processes > 1 else 0.0
    compute = model.fixed + model.per_image * busiest_images(processes, exact=model.exact)
    return Point(processes, cores, model.step(processes, cores), compute, exchange)


def figures(*, no_core=0.0):
    """A round of figures that follow MODEL in both modes, the check included."""
    found = {}
    for mode, shards in scaling.MODES.items():
        model = MODEL._replace(exact=bool(shards))
        names = {scaling.name_of(mode, n): point(n, model=model) for n in scaling.PROCESSES}
        for name, at in (names | {scaling.check_name(mode): point(2, cores=1, model=model)}).items():
            found |= {
                name: at.wall, f"{name}{scaling.COMPUTE}": at.compute, f"{name}{scaling.EXCHANGE}": at.exchange,
                f"{name}{scaling.OTHER_THREADS}": 0.0, f"{name}{scaling.NO_CORE}": no_core * at.wall,
                f"{name}{scaling.BUSIEST}": at.compute,
            }  # fmt: skip
    return found


# Phases


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Rank:
    def exchange(self):
        spin(0.02)
        self.wait()

    def wait(self):
        spin(0.01)
        time.sleep(0.05)


@pytest.fixture
def clock(monkeypatch):
    for name in ("exchange", "wait"):
        monkeypatch.setattr(Rank, name, vars(Rank)[name])  # restored after the test
    clock = PhaseClock()
    clock.watch(f"{__name__}:Rank.exchange", "exchange")
    clock.watch(f"{__name__}:Rank.wait", "wait")
    return clock


def test_a_step_is_split_into_its_phases(clock):
    clock.end_step()
    spin(0.03)
    Rank().exchange()
    clock.end_step()
    (step,) = clock.steps
    assert step.compute == pytest.approx(0.03, abs=0.005 * slowness())
    assert step.exchange == pytest.approx(0.02, abs=0.005 * slowness())
    assert step.waiting >= 0.059  # polling and sleeping
    assert step.wall == step.compute + step.exchange + step.waiting


def test_other_threads_are_counted_apart(clock):
    clock.end_step()
    thread = threading.Thread(target=Rank().exchange)
    thread.start()
    thread.join()
    clock.end_step()
    (step,) = clock.steps
    assert step.exchange < 0.005 * slowness()
    assert step.other_threads == pytest.approx(0.03, abs=0.01 * slowness())


def test_a_failure_inside_an_exchange_ends_it(clock, monkeypatch):
    monkeypatch.setattr(Rank, "wait", lambda self: 1 / 0)
    clock.end_step()
    with pytest.raises(ZeroDivisionError):
        Rank().exchange()
    spin(0.03)
    clock.end_step()
    assert clock.steps[0].compute == pytest.approx(0.03, abs=0.005 * slowness())


@pytest.mark.parametrize("function", [*EXCHANGES, *WAITS])
def test_watched_functions_exist(function):
    module, _, name = function.partition(":")
    owner, _, attribute = name.rpartition(".")
    assert callable(vars(pkgutil.resolve_name(f"{module}:{owner}" if owner else module))[attribute])


def test_the_typical_step_ignores_warm_up_and_outliers():
    walls = [90.0, 80.0, *[1.0, 2.0, 3.0, 4.0, 50.0, 0.5]]
    steps = [StepTimes(wall, wall / 2, wall / 4, 0.0, 0.0) for wall in walls]
    assert typical_step(steps) == StepTimes(2.5, 1.25, 0.625, 0.0, 0.0)


@pytest.mark.slow
def test_every_rank_returns_its_phases(tmp_path):
    arguments = [
        "--data.name", "generated10", "--run_dir", str(tmp_path / "run"), "--epochs", "9", "--device", "cpu", "--threads", "1",
        "--global_batch_size", "32", "--logging.tensorboard", "false",
    ]  # fmt: skip
    settings = {"arguments": arguments, "cores": 1}
    measured = Workload("distributed.bench.workloads.phases_of_steps:run", settings, 12, ranks=2).measure(150)
    assert len(measured.figures) == 2
    for rank in measured.figures:
        assert rank["compute"] > rank["exchange"] > 0.1  # ms
        assert rank["wall"] > 1.5 * rank["compute"]  # two ranks on one core


# The model


def test_the_fit_finds_the_coefficients():
    found = fit([point(processes) for processes in scaling.PROCESSES], exact=False)
    assert list(found) == pytest.approx(list(MODEL))


def test_coefficients_are_not_negative():
    slower_alone = [point(n)._replace(wall=point(n).wall - 6 * (n > 1)) for n in scaling.PROCESSES]
    found = fit(slower_alone, exact=False)
    assert min(found[1:]) == 0
    assert found.per_image == pytest.approx(MODEL.per_image)


def test_more_cores_shorten_the_predicted_step():
    turns = {cores: (MODEL.step(8, cores) - MODEL.synchronizing + MODEL.sharing) for cores in (1, 2, 4, 8, 16)}
    assert {cores: math.ceil(8 / cores) * turns[16] for cores in turns} == pytest.approx(turns)
    assert MODEL.step(1, 1) == MODEL.step(1, 16) == 10 + 0.5 * 128


def test_in_exact_mode_a_process_has_entire_shards():
    assert [busiest_images(n, exact=True) for n in scaling.PROCESSES] == [128, 64, 48, 32, 16]
    assert [busiest_images(n, exact=False) for n in scaling.PROCESSES] == [128, 64, 43, 32, 16]


# The command


def test_every_process_has_one_thread_and_all_cores():
    found = scaling.workloads(Options(root=Path("nowhere"), steps=40), "runs")
    assert [workload.ranks for workload in found.values()] == [1, 2, 3, 4, 8, 2] * 2
    assert list(found)[4:6] == ["fast, 8 processes", "fast, 2 processes on one core"]
    for name, workload in found.items():
        arguments = workload.settings["arguments"]
        assert arguments[arguments.index("--threads") + 1] == "1"
        assert arguments[arguments.index("--exact.shards") + 1] == ("8" if name.startswith("exact") else "0")
        assert (workload.settings["cores"] == 1) or not name.endswith("on one core")


def test_the_report_has_shares_models_and_predictions():
    text = report([figures(no_core=0.01)], cores=2, predicted_cores=[2, 16])
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {name: cells for name, *cells in table}
    assert rows["fast, 2 processes"] == ["48.2", "2,653", "87%", "5%", "8%", "1%", "0.0"]
    assert "+0.0% at 8 processes" in text
    assert "2 processes on one core take 95.5 ms, and the model says 95.5" in text.replace("\n", " ")
    assert rows["exact, 16 cores"][0] == f"{128_000 / MODEL.step(1, 16):,.0f}"
    assert rows["fast, 2 cores"][1] == f"{128_000 / MODEL.step(2, 2):,.0f}"
    assert "warning" not in text


def test_a_busy_machine_is_named():
    assert report([figures(no_core=0.3)], cores=2, predicted_cores=[2]).startswith(
        "warning: a single process had no core for 30% of the time"
    )


def test_predictions_from_a_file_measure_nothing(tmp_path, monkeypatch, capsys):
    file = tmp_path / "scaling.json"
    file.write_text(json.dumps({"machine": {"cores": 2}, "rounds": [figures()]}))
    monkeypatch.setattr(sys, "argv", ["bench", "scaling", "--from", str(file), "--cores", "64"])
    assert main() == 0
    assert "| fast, 64 cores | 1,730 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("scaling", "--cores", "4", "0"), "error: --cores 0: each must be at least 1"),
        (("norm", "--cores", "4"), "error: --cores and --from: apply to scaling only, not to norm"),
        (
            ("scaling", "--device", "cuda"),
            "error: --device cuda: scaling measures processes on the CPU; use --device cpu",
        ),
        (
            ("scaling", "--from", "pyproject.toml"),
            "error: --from pyproject.toml: contains no figures of scaling; name a file that scaling --json wrote",
        ),
    ],
)
def test_invalid_arguments_are_one_line(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert main() == 2
    assert capsys.readouterr() == ("", f"{line}\n")
