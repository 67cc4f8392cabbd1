import subprocess
from pathlib import Path

import pytest

from distributed.host import versions as module
from distributed.host.versions import git_state, versions


def test_versions_include_python_torch_and_numpy():
    assert {"python", "torch", "numpy"} <= versions().keys()
    assert "not installed" not in versions().values()


def test_a_repository_around_the_package_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    installed = tmp_path / "site-packages" / "distributed" / "host"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(installed / "versions.py"))
    assert git_state() == ""
