"""Renting a GPU: packed CIFAR-10, wheels, commands, the bare machine, collected results."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from distributed.errors import InputError
from distributed.gpu_pack import bare_machine, calls, checkout, cifar_parts, collect, wheels

ROOT = Path(__file__).parents[2]


def gpu_pack(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distributed.gpu_pack", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def records() -> dict[str, np.ndarray]:
    """Return small official files: a partial mosaic, several mosaics, and one that ends with a full row."""
    drawn = np.random.default_rng(3)
    counts = {"data_batch_1.bin": 37, "data_batch_2.bin": cifar_parts.IMAGES + 5, "test_batch.bin": 100}
    return {name: drawn.integers(0, 256, (count, 3073), dtype=np.uint8) for name, count in counts.items()}


@pytest.fixture
def parts(records, tmp_path) -> list[Path]:
    folders = [tmp_path / "a", tmp_path / "b"]
    cifar_parts.pack_files(records, folders)
    return folders


def test_unpacked_files_are_the_packed_bytes(records, parts, tmp_path):
    assert all(list(part.glob("*.webp")) for part in parts)
    folder = cifar_parts.unpack(parts[::-1], tmp_path / "data")
    assert folder == tmp_path / "data" / "cifar-10-batches-bin"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: rows.tobytes() for name, rows in records.items()
    }
    assert list(folder.parent.iterdir()) == [folder]


def test_records_have_the_official_binary_layout():
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3)
    records = cifar_parts.records_of(images, np.array([7, 9]))
    assert records[:, 0].tolist() == [7, 9]
    assert (records[1, 1:].reshape(3, 32, 32)[2] == images[1, :, :, 2]).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a, b: (a / "index.json").unlink(), "no index.json"),
        (lambda a, b: next(b.glob("*.webp")).unlink(), "name all parts"),
        (lambda a, b: next(b.glob("*.webp")).write_bytes(b"RIFF"), "damaged"),
        (lambda a, b: (a / "index.json").write_text('{"data_batch_1.bin": 3}'), "damaged"),
        (
            lambda a, b: (a / "test_batch.bin.labels").write_bytes(bytes(100)),
            "unpacked bytes differ from the packed ones",
        ),
        (lambda a, b: (a / "test_batch.bin.labels").unlink(), "the first test_batch.bin.labels; name all parts"),
    ],
)
def test_a_damaged_part_is_one_line_and_leaves_nothing(parts, tmp_path, damage, message):
    damage(*parts)
    refused = gpu_pack("unpack", *parts, "--to", tmp_path / "data")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT names no folder with CIFAR")
def test_real_cifar_survives_packing_in_order(tmp_path):
    from distributed.data.sources import cifar

    root = Path(os.environ["CIFAR_ROOT"])
    folders = [tmp_path / "a", tmp_path / "b"]
    cifar_parts.pack(root, folders)
    cifar_parts.unpack(folders, tmp_path / "data")
    for unpacked, original in zip(
        cifar.read_splits("cifar10", tmp_path / "data"), cifar.read_splits("cifar10", root), strict=True
    ):
        assert (unpacked.images == original.images).all()
        assert (unpacked.labels == original.labels).all()
    assert all(checkout.folder_size(folder) < 56 * 2**20 for folder in folders)


def test_a_call_that_is_too_large_is_refused():
    call = calls.CALLS[0]
    assert calls.check_size(call, {"checkout": 2**20, ".cifar-a": 63 * 2**20}) == calls.MAX_BYTES
    with pytest.raises(InputError, match=r"64\.0 MiB to upload.* \.cifar-a 63\.0"):
        calls.check_size(call, {"checkout": 2**20 + 1, ".cifar-a": 63 * 2**20})


@pytest.mark.parametrize("call", calls.CALLS, ids=lambda call: call.name)
def test_commands_are_valid_shell_within_the_limits(call):
    assert calls.check_size(call, {}) == 0
    parsed = subprocess.run(["bash", "-n", "-c", call.text], capture_output=True, text=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")


def test_carried_folders_are_ignored_by_git(tmp_path):
    names = [calls.WHEELS, *calls.PARTS]
    command = ["git", "check-ignore", *(f"{name}/file" for name in names)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout.split() == [f"{name}/file" for name in names]


def test_uploaded_files_are_those_git_does_not_ignore(tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("build/\n")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "large").write_text("ignored")
    (tmp_path / "new file").write_text("1234")
    checkout.copy(tmp_path, tmp_path / "build" / "copy")
    assert sorted(path.name for path in (tmp_path / "build" / "copy").iterdir()) == [".gitignore", "new file"]
    assert checkout.size_of(tmp_path) == len("build/\n") + 4


def test_a_dry_run_outside_a_checkout_fails_in_one_line(tmp_path):
    refused = gpu_pack("dry-run", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == f"error: {tmp_path}: not the root of a git checkout; run this in the root of one\n"


def wheel(folder: Path, name: str, *requirements: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {line}" for line in requirements)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\n")
    return path


def test_an_unmet_requirement_of_a_wheel_is_found(tmp_path):
    carried = [
        wheel(tmp_path, "first", "numpy>=2", "Second_One", "colorama; sys_platform == 'win32'", "third; extra == 'x'"),
        wheel(tmp_path, "second_one", "nowhere>1; python_version >= '3.12'", "ancient; python_version < '3.8'"),
    ]
    assert wheels.unmet(carried, frozenset({"numpy"})) == {"nowhere"}


def test_the_rented_machine_lacks_the_carried_packages():
    machine = wheels.machine_packages()
    assert machine.isdisjoint(wheels.ROOTS)
    assert {"torch", "numpy", "pillow", "safetensors", "nvidia-cudnn-cu13"} <= machine


def test_the_bare_machine_finds_only_its_packages(tmp_path):
    shown = wheels.machine_packages()
    command = [sys.executable, "-m", "distributed.gpu_pack.bare_machine", tmp_path, *sorted(shown)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    code = """if True:
        import importlib.util, json
        from importlib import metadata
        names = "pydantic loguru tomli_w greenlet deepspeed ray numpy torch PIL json distributed".split()
        print(json.dumps([name for name in names if importlib.util.find_spec(name)]))
        print(json.dumps([name for name in ("pydantic", "numpy") if any(metadata.distributions(name=name))]))
        import numpy, distributed.errors
        try:
            import greenlet
        except ModuleNotFoundError as error:
            print(json.dumps(error.name))
    """
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        ["numpy", "torch", "PIL", "json", "distributed"],
        ["numpy"],
        "greenlet",
    ]


def test_carried_packages_are_not_hidden():
    modules, distributions = bare_machine.hidden({"pydantic", "numpy", "torch"}, ROOT)
    assert {"greenlet", "loguru"} <= modules
    assert {"greenlet", "loguru"} <= distributions
    assert modules.isdisjoint({"pydantic", "numpy", "torch", "distributed"})


def check_line(step: str, verdict: str = "pass", device: str = "cuda", **fields: object) -> str:
    return json.dumps({"step": step, "device": device, "verdict": verdict, "checks": [], **fields})


def all_steps(**verdicts: str) -> str:
    return "".join(check_line(step.name, verdicts.get(step.name, "pass")) + "\n" for step in collect.STEPS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "environment (not run), ceilings (not run)"),
        (all_steps(ranks="fail"), "not passed: ranks (fail); run make gpu-check"),
        (all_steps() + check_line("speed", "timeout"), "not passed: speed (timeout)"),
        (all_steps().replace("cuda", "cpu"), "speed (not run)"),
        (all_steps().replace('"device"', '"tiny": true, "device"'), "speed (not run)"),
    ],
)
def test_results_need_a_passed_check(tmp_path, text, message):
    (tmp_path / "gpu_check.jsonl").write_text(text)
    refused = gpu_pack("passed", tmp_path / "gpu_check.jsonl")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_newest_result_of_a_step_counts(tmp_path):
    file = tmp_path / "gpu_check.jsonl"
    file.write_text(all_steps(ranks="fail") + check_line("ranks") + "\n" + check_line("ranks", "fail")[:-9])
    collect.check_passed(file)


def test_results_are_merged_with_those_of_earlier_rentals(tmp_path):
    source, results = tmp_path / "returned", tmp_path / "results"
    source.mkdir()
    (source / "gpu_check.jsonl").write_text(check_line("units", seconds=1) + "\n" + check_line("speed", seconds=2))
    (source / "gpu_speed.json").write_text('{"card": "a card", "tiny": false}\n')
    (source / "profile.txt").write_text("kernel 1 us\n")
    assert [path.name for path in collect.collect(source, results)] == [
        "gpu_check.json",
        "gpu_speed.json",
        "gpu_profile.txt",
    ]
    for name in ("gpu_speed.json", "profile.txt"):
        (source / name).unlink()
    failure = {
        "check": "sums",
        "verdict": "fail",
        "message": 'File "/somewhere/units.py"\nAssertionError: 1 is not 2\n',
    }
    (source / "gpu_check.jsonl").write_text(check_line("units", "fail", seconds=3, checks=[failure]))
    collect.collect(source, results)
    steps = json.loads((results / "gpu_check.json").read_text())
    assert [(step["step"], step["seconds"]) for step in steps] == [("units", 3), ("speed", 2)]
    assert steps[0]["checks"][0]["message"] == "AssertionError: 1 is not 2"


@pytest.mark.parametrize("found", [{"card": "cpu", "tiny": False}, {"card": "a card", "tiny": True}])
def test_a_trial_of_the_check_replaces_no_figures_of_a_gpu(found, tmp_path):
    source, results = tmp_path / "returned", tmp_path / "results"
    source.mkdir()
    (source / "gpu_check.jsonl").write_text(check_line("units"))
    (source / "gpu_speed.json").write_text(json.dumps(found))
    (source / "profile.txt").write_text("kernel 1 us\n")
    assert [path.name for path in collect.collect(source, results)] == ["gpu_check.json"]


def test_returned_results_are_merged(tmp_path):
    source = tmp_path / "returned"
    source.mkdir()
    records = json.loads((ROOT / "results" / "results.json").read_text())
    for record in records[:2]:
        (source / "results.json").write_text(json.dumps([record]))
        assert collect.collect(source, tmp_path / "results") == [tmp_path / "results" / "results.json"]
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == records[:2]


def test_nothing_to_collect_fails_in_one_line(tmp_path):
    refused = gpu_pack("collect", tmp_path, "--results", tmp_path / "results")
    assert refused.returncode == 2
    assert "no gpu_check.jsonl" in refused.stderr
    assert refused.stderr.count("\n") == 1
