"""The module of an import path: found without running anything, and a useful message if it is not there."""

import hashlib
import sys
from pathlib import Path

import pytest

from distributed.errors import InputError
from distributed.host.importable import check_module, module_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path, with a module and packages that fail if they run."""
    (tmp_path / "outer_zq/inner").mkdir(parents=True)
    (tmp_path / "namespace_zq").mkdir()
    for file in ("single_zq.py", "outer_zq/__init__.py", "outer_zq/inner/__init__.py", "outer_zq/inner/nets.py",
                 "namespace_zq/nets.py"):  # fmt: skip
        (tmp_path / file).write_text("raise AssertionError('this module ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", ["single_zq", "outer_zq.inner.nets", "outer_zq.inner", "namespace_zq.nets"])
def test_a_module_is_found_and_does_not_run(module: str, folder: Path) -> None:
    file = check_module(f"{module}:make", "model.name")
    assert file is not None
    assert file.read_text().startswith("raise")
    assert not {name for name in sys.modules if "_zq" in name}


def test_modules_that_a_package_makes_are_found(folder: Path) -> None:
    (folder / "makes_zq.py").write_text("import sys, types\nsys.modules['makes_zq.made'] = types.ModuleType('made')\n")
    try:
        assert check_module("makes_zq.made:x", "model.name") is None
    finally:
        for name in ("makes_zq", "makes_zq.made"):
            sys.modules.pop(name, None)
    assert check_module("os.path:join", "model.name") is None


MISSING = {
    "single_qz": "there is no module single_qz; did you mean single_zq? Otherwise run the command in the folder",
    "nothing_at_all": "there is no module nothing_at_all; run the command in the folder of nothing_at_all.py (this is ",
    "namespace_zq.net": "there is no module namespace_zq.net; did you mean namespace_zq.nets?",
    "namespace_zq.other": "namespace_zq; did you mean namespace_zq:make?",
    "json.decoder.x": "json.decoder is a module, not a package; write json.decoder:x",
}


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_module_is_named(module: str, folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_module(f"{module}:make", "model.name")
    [line] = caught.value.lines
    assert line.startswith(f"model.name = {module}:make: ")
    assert MISSING[module] in line


def test_the_digest_of_a_file_is_its_sha256(folder: Path) -> None:
    files = module_files({"model.name": "single_zq:make", "loss.name": "os.path:join"})
    assert files["model.name"] == (
        str(folder / "single_zq.py"), hashlib.sha256((folder / "single_zq.py").read_bytes()).hexdigest()
    )  # fmt: skip
    before = files["model.name"].sha256
    (folder / "single_zq.py").write_text("another\n")
    assert module_files({"model.name": "single_zq:make"})["model.name"].sha256 != before
    assert module_files({}) == {}


def test_a_missing_module_is_named_by_its_setting(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^loss\.name = single_qz:f: there is no module single_qz"):
        module_files({"loss.name": "single_qz:f"})


def test_a_metric_of_a_notebook_is_refused_with_the_remedy():
    with pytest.raises(InputError) as caught:
        check_module("__main__:brier", "evaluation.metrics[brier]")
    assert str(caught.value) == (
        "evaluation.metrics[brier] = __main__:brier: a function of a script or notebook cannot be imported; put it into a "
        "module of its own"
    )
