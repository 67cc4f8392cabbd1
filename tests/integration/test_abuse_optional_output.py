"""Full disks, missing packages and odd files in place of optional and requested outputs."""

import json
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from kit.abuse import Outcome, assert_outcome, call, untouched
from kit.commands import ROOT, metrics, status
from kit.trained_runs import copy_of, write_test_images
from loguru import logger
from unit.test_sinks import EPOCH, TRAIN

from distributed.checkpoint.checkpointer import Checkpointer
from distributed.experiments import __main__ as experiments
from distributed.figures.curves import draw_curves
from distributed.metrics.profiler import StepProfiler
from distributed.metrics.reporter import Reporter
from distributed.metrics.sinks import JsonLines, OptionalSink, TensorBoard
from distributed.process.logs import file_logs
from distributed.run.claim import ClaimedRun

pytestmark = pytest.mark.timeout(200)
SETTINGS = (
    ROOT / "configs/debug.toml", "--data.train_samples", 60, "--data.test_samples", 20, "--global_batch_size", 20,
    "--schedule.name", "constant", "--data.validation_fraction", 0, "--device", "cpu", "--logging.level", "WARNING",
    "--evaluation.batch_size", 20, "--logging.every_steps", 1, "--logging.tensorboard", "true", "--logging.curves", "true",
    "--evaluation.test_every_epoch", "false", "--epochs", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "run"
    found = call("train", *SETTINGS, "--run_dir", folder)
    assert found.code == 0, found.err
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_images(tmp_path_factory.mktemp("images") / "new", 1)[0]


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    return small_disk


def warned(found: Outcome) -> list[str]:
    """Return its warnings, except the one about generated images."""
    return [line for line in found.err.splitlines() if " WARNING " in line and "generated images" not in line]


def assert_fine(found: Outcome, *named: str) -> None:
    """Assert that it succeeded, with one warning per name and no others."""
    output = found.out + found.err
    assert "Traceback" not in output, output
    assert (found.code, found.errors) == (0, []), output
    assert len(warned(found)) == len(named), output
    for name in named:
        (line,) = [line for line in warned(found) if f" {name}" in line]
        assert "continuing without it" in line


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Make writes beyond this file size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def warnings_of_the_log() -> Iterator[list[str]]:
    lines: list[str] = []
    handle = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        yield lines
    finally:
        logger.remove(handle)


# Training


def test_run_survives_failure_of_all_optional_outputs(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "tensorboard").write_text("a file")
    (folder / "logs" / "rank-0000.log").symlink_to("/dev/full")
    (folder / "curves.png").mkdir()
    found = call("train", *SETTINGS, "--run_dir", folder)
    assert_fine(found, f"{folder}/tensorboard", f"{folder}/logs/rank-0000.log", f"{folder}/curves.png")
    assert status(folder)["status"] == "finished"
    assert metrics(folder) == metrics(run)


def test_run_survives_missing_tensorboard_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboard.compat.proto.event_pb2", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    folder = tmp_path / "run"
    found = call("train", *SETTINGS, "--run_dir", folder)
    assert_fine(found, f"{folder}/tensorboard", f"{folder}/curves.png")
    assert status(folder)["status"] == "finished"


def test_disk_filling_up_during_training_is_exit_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    real = Reporter.log_step

    def on_a_full_disk(report: Reporter, *values: object, **named: object) -> None:
        if (step := values[0].step) == 1:
            real(report, *values, **named)
            return
        assert step == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "metrics.jsonl").stat().st_size, resource.RLIM_INFINITY))
        real(report, *values, **named)

    monkeypatch.setattr(Reporter, "log_step", on_a_full_disk)
    with files_up_to(resource.RLIM_INFINITY):
        found = call("train", *SETTINGS, "--run_dir", folder)
    assert_outcome(found, f"{folder}/metrics.jsonl: File too large", code=4)
    assert len(metrics(folder)) == 1


def test_unwritable_final_status_is_exit_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    real = Checkpointer.wait

    def then_full(checkpoints: Checkpointer, **named: bool) -> None:
        real(checkpoints, **named)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    monkeypatch.setattr(Checkpointer, "wait", then_full)
    with files_up_to(resource.RLIM_INFINITY):
        found = call("train", *SETTINGS, "--run_dir", folder)
    assert_outcome(found, f"{folder}/status.json: File too large", code=4)


# TensorBoard, profile, curves and log on their own


def fed(sink: OptionalSink, times: int = 4) -> None:
    for _ in range(times):
        sink.log_step(TRAIN)
        sink.log_epoch(EPOCH)
    sink.close()


def broken_folder(path: Path, how: str) -> Path:
    if how == "a file":
        path.write_text("")
    elif how == "a circular link":
        path.symlink_to(path)
    elif how == "a broken link":
        path.symlink_to(path.with_name("gone") / "gone")
    elif how == "a device":
        path.symlink_to("/dev/null")
    elif how == "a name too long":
        return path / ("x" * 300)
    return path


@pytest.mark.parametrize("how", ["a file", "a circular link", "a broken link", "a device", "a name too long"])
def test_tensorboard_in_a_bad_folder_is_one_warning(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = broken_folder(tmp_path / "tensorboard", how)
    with warnings_of_the_log() as lines:
        fed(OptionalSink("tensorboard", lambda: TensorBoard(folder, start_step=0)))
    assert len(lines) == 1
    assert lines[0].startswith("tensorboard: ")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("at", [0, 60, 200, 2000])
def test_tensorboard_on_a_filling_disk_is_one_warning(
    at: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings_of_the_log() as lines, files_up_to(at):
        fed(OptionalSink("tensorboard", lambda: TensorBoard(tmp_path, start_step=0)), times=50)
    assert lines == ["tensorboard: File too large; continuing without it\n"]
    assert "Traceback" not in capfd.readouterr().err
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == at


def test_tensorboard_on_a_full_disk_is_one_warning(full_disk: Path) -> None:
    with warnings_of_the_log() as lines:
        fed(OptionalSink("tensorboard", lambda: TensorBoard(full_disk / "a", start_step=0)))
    assert [line for line in lines if "No space left on device" in line] == lines
    assert len(lines) == 1


def test_broken_protobuf_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise TypeError("Descriptors cannot be created directly.\nDowngrade the protobuf package.")

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", Broken())
    with warnings_of_the_log() as lines:
        fed(OptionalSink("tensorboard", lambda: TensorBoard(tmp_path, start_step=0)))
    assert lines == ["tensorboard: TypeError: Descriptors cannot be created directly.; continuing without it\n"]


def test_non_finite_numbers_reach_tensorboard(tmp_path: Path) -> None:
    from dataclasses import replace

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path, start_step=2)
    sink.log_step(replace(TRAIN, loss=1e308, grad_norm=math.inf, lr=math.nan, accuracy=-0.0))
    sink.log_epoch(EPOCH)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("train/loss")[0].value == math.inf
    assert math.isnan(events.Scalars("train/lr")[0].value)
    assert events.Scalars("epoch/validation_loss")[0].value == pytest.approx(1.3)
    assert "epoch/test_loss" not in events.Tags()["scalars"]


@pytest.mark.parametrize("more", [0, 5])
def test_metrics_on_a_full_disk_are_an_error(more: int, tmp_path: Path) -> None:
    """Not a line without its end, to which the next one would be appended."""
    from distributed.errors import StorageError

    run = ClaimedRun.claim(tmp_path / "run", world_size=1)
    lines = JsonLines(run, start_step=0, start_epoch=0, data="generated10")
    lines.log_step(TRAIN)
    before = run.metrics_file.read_bytes()
    with (
        files_up_to(len(before) + more),
        pytest.raises(StorageError, match="No space left" if more else "File too large"),
    ):
        lines.log_step(TRAIN)
    assert run.metrics_file.read_bytes() == before
    run.release()


@pytest.mark.parametrize("how", ["a file", "a disk that fills up"])
def test_failed_profile_is_one_warning(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    if how == "a file":
        folder.write_text("")
    with warnings_of_the_log() as lines, files_up_to(100), StepProfiler(2, folder, lambda: None) as profiler:
        take_steps(profiler)
    (line,) = lines
    assert str(folder) in line


def take_steps(profiler: StepProfiler) -> None:
    for _ in range(14):
        torch.ones(3).add_(1)
        profiler.step()


def test_beside_another_profiler_a_profile_or_one_warning(tmp_path: Path) -> None:
    """torch may end the other profiler, or refuse to start a second one."""
    from torch.profiler import profile

    folder = tmp_path / "profile"
    with warnings_of_the_log() as lines, StepProfiler(2, folder, lambda: None) as profiler, profile():
        take_steps(profiler)
    assert len(lines) == (0 if (folder / "table.txt").is_file() else 1)


LOGS: dict[str, Callable[[Path], object]] = {
    "a full device": lambda path: path.symlink_to("/dev/full"),
    "a folder": Path.mkdir,
    "a pipe without a reader": os.mkfifo,
    "a circular link": lambda path: path.symlink_to(path),
    "a broken link": lambda path: path.symlink_to("gone/gone"),
}


@pytest.mark.parametrize("case", LOGS)
def test_unwritable_log_is_one_warning(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LOGS[case](tmp_path / "rank-0003.log")
    with warnings_of_the_log() as lines:
        handle = file_logs(tmp_path, 3)
        for place in range(5):
            logger.info("message {}", place)
        logger.remove(handle)
    (line,) = lines
    assert line.startswith(f"{tmp_path}/rank-0003.log: ") or f"{tmp_path}/rank-0003.log: " in line
    assert "Logging error" not in capfd.readouterr().err


def test_log_keeps_its_content_on_a_full_disk(tmp_path: Path) -> None:
    handle = file_logs(tmp_path, 0)
    logger.info("the first")
    with warnings_of_the_log() as lines, files_up_to((tmp_path / "rank-0000.log").stat().st_size + 5):
        for _ in range(3):
            logger.info("the second\ud800")
    logger.remove(handle)
    assert len(lines) == 1
    assert "the first" in (tmp_path / "rank-0000.log").read_text()


def epochs(*losses: object) -> str:
    line = {
        "kind": "epoch", "train_accuracy": 0.5, "test": None, "is_best": True, "lr": 0.1, "seconds": 1.0, "data": "x",
    }  # fmt: skip
    return "\n".join(
        json.dumps(
            line | {"epoch": place, "step": 10 * (place + 1), "train_loss": loss, "validation": {"loss": loss, "accuracy": 0.1}}
        )
        for place, loss in enumerate(losses)
    )  # fmt: skip


METRICS = {
    "not a number": epochs(1.0, math.nan, 0.5),
    "infinite": epochs(math.inf, 1.0),
    "null": epochs(None, 1.0),
    "huge": epochs(1e308, -1e308, 1e-320),
    "a string": epochs("x", 1.0),
    "one point": epochs(1.0),
    "a truncated line": epochs(1.0, 2.0)[:-20],
    "a damaged line between": epochs(1.0, 2.0).replace("\n", "\n{]\0\n"),
    "an empty file": "",
}


@pytest.mark.parametrize("case", METRICS)
def test_curves_of_odd_metrics_are_drawn_or_one_warning(case: str, tmp_path: Path) -> None:
    from distributed.process.optional_output import OptionalOutput

    (tmp_path / "metrics.jsonl").write_text(METRICS[case])
    with warnings.catch_warnings(), warnings_of_the_log() as lines, OptionalOutput("curves.png") as made:
        warnings.simplefilter("ignore")
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="$\\broken{ formula")
    drawn = (tmp_path / "curves.png").exists()
    assert len(lines) == made.failed
    assert drawn != (made.failed or case == "an empty file")
    assert case in ("a string", "huge", "an empty file") or drawn


def test_curves_on_a_full_disk_keep_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(METRICS["one point"])
    (tmp_path / "curves.png").write_text("before")
    with files_up_to(100), pytest.raises(OSError, match="File too large"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="a run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert (tmp_path / "curves.png").read_text() == "before"


# Commands: numbers with a picture

PICTURES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a full device": lambda path: path.symlink_to("/dev/full"),
    "a broken link": lambda path: path.symlink_to("gone/gone"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_evaluate_prints_numbers_without_the_picture(case: str, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    PICTURES[case](copy / "confusion-test.png")
    found = call("evaluate", copy, "--json")
    assert_fine(found, f"{copy}/confusion-test.png")
    result = json.loads(found.out)
    assert (result["images"], result["picture"]) == (20, None)


def test_evaluate_without_matplotlib_prints_numbers(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    copy = copy_of(run, tmp_path / "run")
    found = call("evaluate", copy)
    assert_fine(found, f"{copy}/confusion-test.png")
    assert "top-1" in found.out
    assert "confusion matrix" not in found.out


def test_evaluate_on_a_full_disk_prints_numbers(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    with files_up_to(100):
        found = call("evaluate", copy)
    assert_fine(found, f"{copy}/confusion-test.png")
    assert "top-1" in found.out
    assert not list(copy.glob("*confusion*"))


def test_evaluate_fails_without_the_requested_picture(run: Path) -> None:
    with untouched(run):
        found = call("evaluate", run, "--confusion", "/dev/full")
    assert_outcome(found, "--confusion /dev/full: not written: No space left on device", code=4)
    assert "top-1" in found.out


def test_predict_prints_classes_before_the_picture_fails(run: Path, image: Path) -> None:
    found = call("predict", run, image, "--picture", "/dev/full")
    assert_outcome(found, "--picture /dev/full: not written: No space left on device; free disk space", code=4)
    assert found.out.startswith(str(image))


def test_predict_without_matplotlib_prints_classes(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = call("predict", run, image, "--picture", image.with_name("picture.png"))
    assert_outcome(found, "--picture", "matplotlib", "repair that package's installation")
    assert found.out.startswith(str(image))


@pytest.mark.parametrize("format", ["safetensors", "torch.export", "onnx"])
def test_export_to_a_full_disk_is_exit_4(format: str, run: Path, tmp_path: Path) -> None:
    with files_up_to(2000):
        found = call("export.__main__", run, "--format", format, "--out", tmp_path / "out")
    assert_outcome(found, f"--out {tmp_path}/out/model", "not written: File too large", code=4)
    assert list((tmp_path / "out").iterdir()) == []


def test_report_to_a_full_disk_is_exit_4(run: Path, full_disk: Path) -> None:
    found = call("report.__main__", run, "--out", full_disk / "report.html")
    assert_outcome(found, f"--out {full_disk}/report.html: not written: No space left on device", code=4)
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


def test_report_without_matplotlib_has_its_numbers(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for runs in ([run], [run, run]):
        found = call("report.__main__", *runs, "--out", tmp_path / "report.html")
        assert (found.code, found.errors) == (0, []), found.err
        page = (tmp_path / "report.html").read_text()
        assert "This section could not be created: ModuleNotFoundError" in page
        assert "Settings" in page


def test_export_without_onnxruntime_checks_the_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = call("export.__main__", run, "--format", "onnx", "safetensors", "--out", tmp_path / "out")
    assert_outcome(found, "--format onnx: ", "is written, but could not be checked: ModuleNotFoundError")
    assert (tmp_path / "out/model.onnx").is_file()
    assert "model.safetensors  " in found.out


def test_unwritable_results_do_not_end_the_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(
        experiments, "_torchrun", lambda processes, arguments, deadline: started.append(arguments[0]) or 0
    )
    arguments = ("--only", "I-10", "I-50", "--runs", tmp_path / "runs", "--out", tmp_path / "table.json")
    with files_up_to(1):
        found = call("experiments.__main__", *arguments)
    assert_outcome(found, f"--out {tmp_path}/table.json: not written: File too large", code=4)
    assert len(started) == 2
    assert "| id | seed |" in found.out


def test_summary_is_printed_if_its_file_is_unwritable(run: Path, tmp_path: Path, capsys) -> None:
    from launch import summary

    copy_of(run, tmp_path / "runs" / "seed-0")
    (tmp_path / "runs" / "summary.txt").mkdir()
    before = sys.argv
    try:
        sys.argv = ["summary", str(tmp_path / "runs")]
        with warnings_of_the_log() as lines:
            assert summary.main() == 0
    finally:
        sys.argv = before
    assert "seed-0" in capsys.readouterr().out
    assert len(lines) == 1


def closed() -> object:
    file = open(os.devnull, "w")  # noqa: SIM115
    file.close()
    return file


def broken_pipe() -> object:
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", buffering=1)


STREAMS: dict[str, Callable[[], object]] = {
    "closed": closed,
    "none": lambda: None,
    "a full disk": lambda: open("/dev/full", "w", buffering=1),  # noqa: SIM115
    "a broken pipe": broken_pipe,
}


@pytest.mark.parametrize("case", STREAMS)
def test_broken_terminal_does_not_stop_progress_bars(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed.data.sources.progress import progress

    monkeypatch.setattr("distributed.data.sources.progress.LINE_EVERY_SECONDS", 0.0)
    stream = STREAMS[case]()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("decoding", 3, unit="images") as advance:
        advance(1)
    with suppress(OSError):
        if stream:
            stream.close()


@pytest.mark.parametrize("case", STREAMS)
def test_broken_terminal_does_not_stop_logging(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed.process import logs

    stream = STREAMS[case]()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.terminal_logs(0)
    logger.warning("a message")
    logger.remove()
    with suppress(OSError):
        if stream:
            stream.close()
