"""A download requested on the command line, with two processes."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from kit.commands import Command, status, torchrun
from kit.http_server import serving
from kit.small_cifar import RECORDS

from distributed.data.sources.cifar_spec import CIFAR10

ARCHIVE = "cifar-10-binary.tar.gz"


def small_archive() -> bytes:
    packed, drawn = io.BytesIO(), np.random.default_rng(2)
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file in (*CIFAR10.forms[0].train, CIFAR10.forms[0].test):
            records = drawn.integers(0, 256, (RECORDS, 3073)).astype(np.uint8)
            records[:, 0] %= 10
            member = tarfile.TarInfo(f"{CIFAR10.forms[0].folder}/{file}")
            member.size = records.nbytes
            tar.addfile(member, io.BytesIO(records.tobytes()))
    return packed.getvalue()


@pytest.mark.timeout(150)
def test_two_processes_download_once_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = small_archive()
    monkeypatch.setenv("SMALL_CIFAR_MD5", hashlib.md5(content).hexdigest())
    with serving(content) as server:
        urls = json.dumps([server.url(manner, ARCHIVE) for manner in ("404", "slow")])
        arguments = ("--data.download", "--data.urls", urls, "--data.root", tmp_path / "data", "--epochs", 1)
        more = (
            "--device",
            "cpu",
            "--global_batch_size",
            24,
            "--data.validation_fraction",
            0,
            "--run_dir",
            tmp_path / "run",
        )
        started = torchrun(2, *arguments, *more, module="kit.small_cifar")
        with Command(started, output=tmp_path / "output") as command:
            assert command.wait(100) == 0, command.text
        assert server.manners() == ["404", "slow"]
    assert status(tmp_path / "run")["step"] == 5 * RECORDS // 24
    assert len(re.findall(rf"{ARCHIVE}: \d+ kB after", command.text)) == 1
    assert f"on cifar10: {5 * RECORDS} training images" in command.text
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["classes"] == list(CIFAR10.class_names)


@pytest.mark.timeout(150)
def test_a_failed_download_is_reported_once(tmp_path: Path) -> None:
    with serving() as server:
        urls = json.dumps([server.url("404", ARCHIVE)])
        arguments = (
            "--data.download",
            "--data.urls",
            urls,
            "--data.root",
            tmp_path / "data",
            "--run_dir",
            tmp_path / "run",
            "--device",
            "cpu",
        )
        with Command(torchrun(2, *arguments), output=tmp_path / "output") as command:
            assert command.wait(100) != 0
    assert command.text.count(f"error: download of {ARCHIVE}: {server.url('404', ARCHIVE)}: HTTP 404") == 1
    assert "failed (exitcode: 2)" in command.text
    assert not (tmp_path / "run").exists()
