"""The environment with other frameworks. pip reads no index here: a framework is a wheel of one small module."""

import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from distributed.bench import peers
from distributed.bench.peers import PEERS, Peer, installed_versions, peer_python
from distributed.errors import InputError


@pytest.fixture
def one_peer(tmp_path, monkeypatch):
    """Makes a wheel of `small_peer` 1.2, and lets pip find it and nothing else."""
    metadata = "small_peer-1.2.dist-info"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "small_peer-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small_peer.py", "import torch, distributed\n")
        wheel.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: small_peer\nVersion: 1.2\n")
        wheel.writestr(
            f"{metadata}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{metadata}/RECORD", f"small_peer.py,,\n{metadata}/METADATA,,\n{metadata}/WHEEL,,\n{metadata}/RECORD,,\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(peers, "PEERS", {"small": Peer("small_peer", "small-peer>=1.1")})


def where(python, module):
    code = f"from importlib.util import find_spec; print(find_spec({module!r}).origin)"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def test_the_extra_names_the_peers():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["bench"] == [peer.requirement for peer in PEERS.values()]


def test_the_environment_adds_a_peer_to_the_packages_here(one_peer, tmp_path):
    folder = tmp_path / "environment"
    python = peer_python(folder, ["small"])
    assert where(python, "small_peer").is_relative_to(folder)
    import torch

    assert where(python, "torch") == Path(torch.__file__)
    assert installed_versions(python) == {"small-peer": "1.2"}

    marker = folder / "bench-peers.json"
    before = marker.stat().st_mtime_ns
    assert peer_python(folder, ["small"]) == python
    assert marker.stat().st_mtime_ns == before  # reused

    marker.write_text("{}")  # as an interrupted installation leaves it
    assert peer_python(folder, ["small"]) == python
    assert marker.read_text() != "{}"


def test_a_failure_of_pip_is_one_line(one_peer, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"small": Peer("small_peer", "small-peer>=7")})
    with pytest.raises(InputError) as raised:
        peer_python(tmp_path / "environment", ["small"])
    assert str(raised.value) == (
        f"--peers {tmp_path / 'environment'}: pip failed: ERROR: No matching distribution found for small-peer>=7; check "
        "pip's package index, or measure without other frameworks: --no-peers"
    )


def test_a_folder_with_other_content_is_kept(one_peer, tmp_path):
    (tmp_path / "file").write_text("content")
    with pytest.raises(InputError, match=r"has other content; name a new or empty folder$"):
        peer_python(tmp_path, ["small"])
    assert (tmp_path / "file").read_text() == "content"


def test_installed_peers_need_no_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"small": Peer("numpy", "numpy>=2.0.0")})
    assert peer_python(tmp_path / "environment", ["small"]) == Path(peers.sys.executable)
    assert not (tmp_path / "environment").exists()


def test_an_older_peer_is_missing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(peers, "PEERS", {"small": Peer("numpy", "numpy>=999.0.1")})
    with pytest.raises(InputError, match=r"has other content; name a new or empty folder$"):  # for the environment
        peer_python(tmp_path, ["small"])
