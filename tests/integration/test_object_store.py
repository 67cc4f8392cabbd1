"""Runs that upload to a store over HTTP, through kills and outages. `kit/object_store.py` says which store."""

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.abuse import assert_outcome, call, untouched
from kit.commands import Command, alone, assert_same_bits, kill, metrics, status, torchrun
from kit.object_store import KEYS, NO_RETRIES, Relay, running
from safetensors.torch import load_file

SETTINGS = (
    "configs/debug.toml", "--epochs", 2, "--data.train_samples", 300, "--data.test_samples", 40, "--threads", 1,
    "--device", "cpu",
    "--checkpoint.every_steps", 3, "--evaluation.test_every_epoch", "false", "--global_batch_size", 40,
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
    if "S3_ENDPOINT" not in os.environ:
        pytest.importorskip(
            "moto.server", reason="no store: pip install 'moto[s3]' flask flask-cors, or name one with S3_ENDPOINT"
        )
    with running() as port:
        yield port


@pytest.fixture
def relay(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    relay = Relay(server)
    for name, value in {**KEYS, **NO_RETRIES, "AWS_ENDPOINT_URL": relay.endpoint}.items():
        monkeypatch.setenv(name, value)
    yield relay
    relay.close()


@pytest.fixture
def bucket(server: int, relay: Relay) -> str:
    """The URL of a new, empty prefix."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    files(server).mkdir(name)
    return f"s3://{name}/runs/one"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run)
    return run


def files(port: int) -> Any:
    """The store, accessed without the relay."""
    import s3fs

    keys = {"key": KEYS["AWS_ACCESS_KEY_ID"], "secret": KEYS["AWS_SECRET_ACCESS_KEY"]}
    return s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", use_listings_cache=False, **keys)


def train(run: Path, *more: object) -> str:
    found = call("train", *SETTINGS, "--run_dir", run, *more)
    assert found.code == 0, found.err
    return found.out + found.err


def complete(port: int, url: str) -> list[str]:
    """The names of the checkpoints in the store that have a manifest."""
    return [path.split("/")[-2] for path in sorted(files(port).glob(f"{url}/step-*/manifest.json"))]


def assert_same_ending(run: Path, reference: Path) -> Path:
    """Compare the final tensors, and the metrics since the resume. Returns the newest checkpoint."""
    ours, theirs = (max((folder / "checkpoints").glob("step-*")) for folder in (run, reference))
    assert ours.name == theirs.name
    found, expected = load_file(ours / "tensors.safetensors"), load_file(theirs / "tensors.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    logged = metrics(run)
    assert logged == metrics(reference)[-len(logged) :]
    return ours


@pytest.mark.slow
def test_a_stopped_run_resumes_elsewhere_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """Without a server: to a file:// URL. The last save is uploaded before the processes exit."""
    url = f"file://{tmp_path}/store"
    arguments = torchrun(2, *SETTINGS, "--run_dir", tmp_path / "stopped", "--checkpoint.upload_to", url)
    with Command(arguments, output=tmp_path / "output") as command:
        command.wait_for(lambda: list((tmp_path / "store").glob("step-*/manifest.json")), what="an upload")
        kill(command.ranks()[-1], number=signal.SIGTERM)
        assert command.wait() != 0
    assert status(tmp_path / "stopped")["status"] == "stopped", command.text
    name = f"step-{status(tmp_path / 'stopped')['step']:08d}"
    assert [path.name for path in (tmp_path / "store").glob(f"{name}-*/manifest.json")] == ["manifest.json"]
    shutil.rmtree(tmp_path / "stopped")
    log = train(tmp_path / "run", "--checkpoint.upload_to", url)
    assert f"resuming at step {int(name[5:])}: " in log
    assert_same_ending(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_killed_during_an_upload_resumes_elsewhere(
    server: int, relay: Relay, bucket: str, undisturbed: Path, tmp_path: Path
) -> None:
    """Two processes are killed before the second manifest; one process resumes in an empty folder."""
    arguments = torchrun(2, *SETTINGS, "--run_dir", tmp_path / "lost", "--checkpoint.upload_to", bucket)
    manifests: list[str] = []
    with Command(arguments, output=tmp_path / "output") as command:

        def kill_at_second_manifest(path: str) -> None:
            manifests.extend([path] if path.endswith("/manifest.json") else [])
            if len(manifests) == 2:
                relay.is_cut = True
                kill(*command.ranks(), command.process.pid)

        relay.on_put = kill_at_second_manifest
        command.wait()
    incomplete, (kept,) = manifests[1].split("/")[-2], complete(server, bucket)
    assert files(server).exists(f"{bucket}/{incomplete}/tensors.safetensors")
    assert kept < incomplete
    relay.is_cut, relay.on_put = False, lambda _: None
    shutil.rmtree(tmp_path / "lost")
    log = train(tmp_path / "run", "--checkpoint.upload_to", bucket)
    assert f"downloading {bucket}/{kept}" in log
    assert f"resuming at step {int(kept[5:13])}: " in log
    ours = assert_same_ending(tmp_path / "run", undisturbed)
    assert complete(server, bucket) == sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert f"{ours.name} has been uploaded to {bucket}" in log.splitlines()[-1]
    for file in ours.iterdir():
        assert files(server).cat_file(f"{bucket}/{ours.name}/{file.name}") == file.read_bytes()


@pytest.mark.slow
def test_a_store_outage_does_not_stop_training(
    server: int, relay: Relay, bucket: str, undisturbed: Path, tmp_path: Path
) -> None:
    run, seen = tmp_path / "run", list[str]()

    def cut_after_first_upload(path: str) -> None:
        seen.append(path)
        relay.is_cut = sum(path.endswith("/manifest.json") for path in seen) > 1

    relay.on_put = cut_after_first_upload
    log = train(run, "--checkpoint.upload_to", bucket)
    assert_same_bits(run, undisturbed)
    assert len(complete(server, bucket)) == 1
    assert "WARNING not uploaded: " in log
    assert f"NOT UPLOADED: {status(run)['step']:08d}".replace(": ", ": step-") in log.splitlines()[-1]
    relay.is_cut, relay.on_put = False, lambda _: None
    # A new process: it sets up no logs, and this one has removed loguru's default.
    again = alone(*SETTINGS, "--run_dir", run, "--checkpoint.upload_to", bucket)
    with Command(again, output=tmp_path / "again") as command:
        assert command.wait() == 0, command.text
    assert "this run is finished" in command.text
    assert complete(server, bucket) == sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert "has been uploaded to" in command.text.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no such bucket"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "no permission to read, write and remove"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "check the network and the store's endpoint"),
    ],
    ids=["no bucket", "wrong key", "no server"],
)
def test_an_unusable_store_is_refused(
    change: dict[str, str], message: str, relay: Relay, bucket: str, tmp_path: Path
) -> None:
    if "AWS_SECRET_ACCESS_KEY" in change and "S3_ENDPOINT" not in os.environ:
        pytest.skip("moto's server accepts any key; name a store with S3_ENDPOINT")
    url = bucket if change else "s3://no-such-bucket-here/x"
    arguments = (
        "--data.name=generated10",
        "--device=cpu",
        "--run_dir",
        tmp_path / "run",
        "--checkpoint.upload_to",
        url,
    )
    with untouched(tmp_path):
        assert_outcome(call("train", *arguments, **change), f"checkpoint.upload_to = {url}: ", message)
