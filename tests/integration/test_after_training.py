"""The commands for a trained run: evaluate, predict, export, report; each also in a process of its own, as users start it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kit.abuse import call
from kit.commands import Command, metrics, torchrun
from kit.trained_runs import (
    CLASSES,
    NORMALIZATION,
    command,
    copy_of,
    damage,
    edit_state,
    newest,
    train_small,
    without_data,
    write_test_images,
)
from PIL import Image
from unit.test_report import assert_self_contained

from distributed import load
from distributed.build import read_data
from distributed.inference.saved_run import read_config

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def no_data(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with class names and normalization in its checkpoints, and with missing data."""
    return without_data(run, tmp_path_factory.mktemp("no_data") / "run", classes=CLASSES, normalization=NORMALIZATION)


def inside(module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Like `command`, but within this process, which is faster."""
    found = call(module, *arguments)
    return subprocess.CompletedProcess([], found.code, found.out, found.err)


def logits_of(run: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load(run).classifier(images)


def test_evaluate_is_equal_on_one_process_and_on_two(run: Path, tmp_path: Path) -> None:
    alone = command("evaluate", run, "--checkpoint", "latest", "--json")
    assert alone.returncode == 0, alone.stderr
    printed = json.loads(alone.stdout)
    logged = metrics(run)[-1]["test"]
    assert (printed["loss"], printed["top1"], printed["top5"]) == (
        logged["loss"],
        logged["accuracy"],
        logged["accuracy5"],
    )
    assert [sum(row) for row in printed["confusion"]] == [11, 11, 11, *[10] * 7]
    assert sum(printed["confusion"][label][label] for label in range(10)) == round(103 * printed["top1"])
    assert [one["count"] for one in printed["classes"]] == [11, 11, 11, *[10] * 7]
    assert Image.open(run / "confusion-test.png").size[0] > 500

    options = ("--checkpoint", "latest", "--json", "--confusion", tmp_path / "two.png")
    with Command(torchrun(2, run, *options, module="distributed.evaluate"), output=tmp_path / "out") as two:
        assert two.wait() == 0, two.text
    line = next(line for line in two.text.splitlines() if line.startswith("{"))
    assert json.loads(line) == printed | {"picture": str(tmp_path / "two.png")}
    assert (tmp_path / "two.png").is_file()


def test_evaluate_prints_a_table_of_classes(run: Path, tmp_path: Path) -> None:
    named = copy_of(run, tmp_path / "run")
    edit_state(newest(named), classes=CLASSES)
    result = inside("evaluate", named, "--split", "validation", "--checkpoint", "latest")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("improved_alexnet on generated10, validation split (80 images), step-")
    assert [line.split("  ")[0] for line in lines if line.startswith("class <")] == CLASSES
    assert lines[-1] == f"confusion matrix: {named}/confusion-validation.png"


def test_predict_matches_the_network(run: Path, tmp_path: Path) -> None:
    paths = write_test_images(tmp_path / "images", 3)
    picture = tmp_path / "picture.png"
    result = inside("predict", run, *paths, "--json", "--picture", picture)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    # The network's outputs on the same images, as the data pipeline yields them.
    config = read_config(run)
    trained = load(run)
    with torch.no_grad():
        expected = trained.network(next(read_data(config).evaluation("test")).images[:3]).softmax(1)
    for one, path, row in zip(printed["images"], paths, expected, strict=True):
        assert one["image"] == str(path)
        probabilities, classes = row.topk(5)
        assert [top["class"] for top in one["top"]] == [trained.class_names[c] for c in classes.tolist()]
        assert [top["probability"] for top in one["top"]] == pytest.approx(probabilities.tolist(), rel=1e-4)
    assert Image.open(picture).size[0] > 500


def test_predict_needs_no_data_and_accepts_any_image_size(no_data: Path, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "photo.jpg")
    result = command("predict", no_data, tmp_path / "photo.jpg")
    assert (result.returncode, result.stderr) == (0, "")
    [line] = result.stdout.splitlines()
    assert line.startswith(f"{tmp_path}/photo.jpg  class <")
    assert line.count("%") == 5


def test_pictures_of_many_images_have_a_limit(no_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.predict._PICTURED", 2)
    names = [tmp_path / name for name in ("a.png", "b.png", "c\n\x1b[2J.png")]
    for name in names:
        Image.new("RGB", (32, 32)).save(name)
    result = inside("predict", no_data, *names, "--picture", tmp_path / "picture.png")
    assert result.returncode == 0, result.stderr
    assert result.stderr == f"{tmp_path}/picture.png: the first 2 of 3 images\n"
    assert "c\\n\\x1b[2J.png" in result.stdout
    width, height = Image.open(tmp_path / "picture.png").size
    assert width > 3 * height, "one row"


def test_exported_files_match_the_network(no_data: Path, tmp_path: Path) -> None:
    import onnxruntime

    result = command("export", no_data, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("compared on 64 random pixels")
    assert [line.split()[0] for line in lines[1:]] == ["safetensors", "onnx", "torch.export"]
    assert all("largest difference of a logit" in line for line in lines[1:])
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (facts["classes"], facts["normalization"]) == (CLASSES, NORMALIZATION)
    assert facts["architecture"]["name"] == "improved_alexnet"
    # Once more by hand, on a batch size that the export did not use.
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = logits_of(no_data, images)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    [onnx] = session.run(None, {"images": images.numpy()})
    exported = torch.export.load(tmp_path / "out" / "model.pt2").module()(images)
    for logits in (torch.from_numpy(onnx), exported):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES


def test_an_export_beyond_the_tolerance_fails(run: Path) -> None:
    result = inside("export", run, "--format", "safetensors", "--tolerance", "-1")
    assert result.returncode == 1
    assert "compared on 64 test images" in result.stdout
    assert "MORE THAN -1: do not use this file" in result.stdout
    assert sorted(path.name for path in (run / "export").iterdir()) == ["model.json", "model.safetensors"]


def test_the_report_of_one_run_has_every_section(run: Path, tmp_path: Path) -> None:
    named = copy_of(run, tmp_path / "run <1>")
    edit_state(newest(named), classes=CLASSES)
    result = inside("report", named, "--checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    document = (named / "report.html").read_text()
    assert result.stdout.startswith(f"{named}/report.html (")
    assert_self_contained(document)
    assert "could not be created" not in document
    for heading in (
        "Attempts", "Learning curves", "Speed", "Test results", "Classes", "Most confident mistakes",
        "Augmented training images", "First-layer filters", "Settings",
    ):  # fmt: skip
        assert f"<h3>{heading}</h3>" in document
    assert document.count('alt="an augmented training image') == 24
    assert document.count('alt="an image of class &lt;') == 24
    assert document.count('alt="filter ') == 32
    assert "global_batch_size = 32" in document


def test_the_report_of_several_runs_compares_them(run: Path, no_data: Path, tmp_path: Path) -> None:
    bare = copy_of(run, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    (bare / "metrics.jsonl").unlink()
    out = tmp_path / "new folder" / "both.html"
    result = command("report", no_data, bare, damage(copy_of(run, tmp_path / "other" / "run")), "--out", out)
    assert result.returncode == 0, result.stderr
    document = out.read_text()
    assert_self_contained(document)
    for expected in (
        f">{no_data}<", f">{tmp_path}/other/run<", ">bare<",  # of folders with the same name the paths
        "Comparison", "data.name", "Bit-identical?", "are bit-identical:",
        "No epoch has finished yet", "has not saved a checkpoint yet", "point --data.root at the folder", ": damaged: tensors",
    ):  # fmt: skip
        assert expected in document


def refused(result) -> str:  # type: ignore[no-untyped-def]
    """Return the one line of a command that was refused."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return str(result.stderr)


def test_wrong_input_is_one_line_with_the_remedy(run: Path, no_data: Path, tmp_path: Path) -> None:
    notes, image = tmp_path / "notes.txt", tmp_path / "image.png"
    notes.write_text("no image")
    Image.new("RGB", (32, 32)).save(image)
    assert "choose one of: best, latest, step-" in refused(inside("predict", run, image, "--checkpoint", "other"))
    assert f"{tmp_path}/cat.png: no such file" in refused(inside("predict", run, tmp_path / "cat.png"))
    assert f"{tmp_path}: a folder; name the images in it" in refused(inside("predict", run, tmp_path))
    assert f"{notes}: not an image that can be decoded" in refused(inside("predict", run, notes))
    (notes.parent / "empty.png").touch()
    some = inside("predict", run, notes, image, notes.parent / "empty.png")
    assert (some.returncode, len(some.stdout.splitlines()), len(some.stderr.splitlines())) == (2, 1, 2), some
    assert "--picture" in refused(inside("predict", run, image, "--picture", notes / "out.png"))
    assert "--format pickle: should be one of safetensors, onnx, torch.export, all" in refused(
        inside("export", run, "--format", "pickle")
    )
    assert f"--out {notes}" in refused(inside("export", run, "--out", notes))
    assert f"--out {notes}/report.html: " in refused(inside("report", run, "--out", notes / "report.html"))
    assert f"--confusion {tmp_path}: is a folder" in refused(inside("evaluate", run, "--confusion", tmp_path))
    assert "data.name = cifar10" in refused(inside("evaluate", no_data))
    assert "data.name = cifar10" in refused(inside("export", no_data, "--data.root", tmp_path))
    with Command(torchrun(2, tmp_path / "none", module="distributed.evaluate"), output=tmp_path / "out") as two:
        assert two.wait() == 1
    assert two.text.count("error: ") == 1, two.text
    unused = refused(inside("report", run, "--data.root", tmp_path))
    assert f"--data.root {tmp_path}: this run used data.name = generated10; leave it out" in unused
    assert "choose one of: best, latest, step-" in refused(inside("report", run, "--checkpoint", "other"))


def test_a_damaged_checkpoint_is_never_used(run: Path, tmp_path: Path) -> None:
    damaged, image = damage(copy_of(run, tmp_path / "run")), tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    for module, arguments in (("evaluate", []), ("predict", [image]), ("export", [])):
        message = refused(inside(module, damaged, *arguments))
        assert "tensors.safetensors" in message
        assert "damaged" in message
        assert "name another with --checkpoint" in message


def test_a_checkpoint_of_another_network_is_one_line(run: Path, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "run")
    for checkpoint in (other / "checkpoints").glob("step-*"):
        edit_state(checkpoint, classes=["cat", "dog"])
    message = refused(inside("export", other, "--format", "safetensors"))
    assert "does not fit the run's config.toml" in message
    assert "fc3.weight" in message


@pytest.fixture(scope="module")
def confusion(run: Path) -> object:
    """The run's confusion matrix, evaluated on the CPU as it was trained."""
    result = inside("evaluate", run, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["confusion"]


def trained_on_cuda(run: Path, there: Path, precision: str) -> Path:
    """Copy the run with CUDA and this precision in its config."""
    config = (copy_of(run, there) / "config.toml").read_text()
    assert 'device = "cpu"' in config
    config = config.replace('device = "cpu"', 'device = "cuda"')
    (there / "config.toml").write_text(config.replace('precision = "float32"', f'precision = "{precision}"'))
    return there


@pytest.mark.parametrize(("precision", "arguments"), [("float32", []), ("tf32", []), ("tf32", ["--device", "cpu"])])
def test_a_cuda_run_is_evaluated_without_a_gpu(
    run: Path, confusion: object, tmp_path: Path, precision: str, arguments: list[str]
) -> None:
    result = inside("evaluate", trained_on_cuda(run, tmp_path / "run", precision), "--json", *arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["confusion"] == confusion


def test_a_cuda_run_is_used_without_a_gpu(run: Path, tmp_path: Path) -> None:
    there = trained_on_cuda(run, tmp_path / "run", "tf32")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    assert "no CUDA device" in refused(inside("evaluate", there, "--device", "cuda"))
    for module, arguments in (
        ("predict", [tmp_path / "image.png"]),
        ("export", ["--format", "safetensors"]),
        ("report", []),
    ):
        result = inside(module, there, *arguments)
        assert result.returncode == 0, (module, result.stderr)


@pytest.mark.slow
@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT names no folder with CIFAR")
def test_a_hundred_classes_of_real_images(tmp_path: Path) -> None:
    """A tenth of CIFAR-100 and a narrow network are enough for results in every class."""
    run, root = tmp_path / "run", os.environ["CIFAR_ROOT"]
    trained = inside(
        "train", "--device", "cpu", "--data.name", "cifar100", "--data.root", root,
        "--data.validation_fraction", 0.9, "--epochs", 1, "--model.name", "fast_alexnet", "--model.widths", "[16, 64, 64]",
        "--schedule.name", "constant", "--optim.lr", 0.02, "--global_batch_size", 64, "--run_dir", run,
        "--logging.tensorboard", "false",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    result = inside("evaluate", run, "--json")
    printed = json.loads(result.stdout)
    assert [sum(row) for row in printed["confusion"]] == [100] * 100
    assert len({one["name"] for one in printed["classes"]}) == 100
    assert 0.015 < printed["top1"] < 0.5
    assert Image.open(run / "confusion-test.png").size[0] > 2000  # large enough for 100 legible names
    exported = inside("export", run, "--format", "onnx", "--tolerance", 1e-4)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert "compared on 64 test images" in exported.stdout
    reported = inside("report", run)
    assert reported.returncode == 0, reported.stderr
    document = (run / "report.html").read_text()
    assert_self_contained(document)
    assert "could not be created" not in document
    assert "All 100 classes" in document
