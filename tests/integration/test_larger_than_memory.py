"""Mapped arrays larger than the memory that the process may use: trained and evaluated, in bounded memory."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kit.cgroups import ROOT, limited_group
from kit.commands import Command, status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
DATA_BYTES = 1.3e9  # 6e9 passes too, and takes five times as long
LIMIT_BYTES = 0.75 * 2**30
ANONYMOUS_BYTES = 0.5 * 2**30  # half of it is torch's own memory
SIDE = 256
NETWORK = """\
from torch import nn


def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of this machine whose memory, with its page cache, is limited."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {controllers: path.strip("/") for _, controllers, path in lines}
    v1 = ROOT / "memory" / own.get("memory", "")
    candidates = {v1: "memory.limit_in_bytes", ROOT: "memory.max"}
    yield from limited_group(candidates, int(LIMIT_BYTES), noun="control group for memory")


def write_data(root: Path) -> None:
    """Write DATA_BYTES of distinct images, and drop them from the page cache."""
    if os.statvfs(root).f_bavail * os.statvfs(root).f_frsize < 1.2 * DATA_BYTES:
        pytest.skip(f"no {DATA_BYTES / 1e9:.0f} GB of disk space")
    tile = np.random.default_rng(0).integers(0, 250, (64, SIDE, SIDE, 3), dtype=np.uint8)
    for split, count in (("train", int(DATA_BYTES) // tile[0].nbytes), ("test", 64)):
        file = root / f"{split}_images.npy"
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
        with file.open("wb") as opened:
            np.lib.format.write_array_header_1_0(opened, header)
            for start in range(0, count, len(tile)):
                tile[:, 0, 0] = start % 250
                opened.write(tile[: count - start].data)
            opened.flush()
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        np.save(root / f"{split}_labels.npy", np.arange(count) % 4)


def anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def test_the_memory_of_a_process_is_bounded(group: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    write_data(tmp_path)
    written = time.monotonic()
    (tmp_path / "net.py").write_text(NETWORK)
    train = (
        f"exec {sys.executable} -m distributed.train --data.name arrays --data.root . --model.name net:make "
        "--model.input_side 32 --epochs 1 --global_batch_size 32 --evaluation.batch_size 32 --schedule.name constant "
        "--device cpu --exact.shards 0 --run_dir run"
    )
    command = ["sh", "-c", f"echo $$ > {group}/cgroup.procs && {train}"]
    most = 0
    with Command(command, output=tmp_path / "output", cwd=tmp_path) as started:
        while started.process.poll() is None:
            most = max(most, anonymous_bytes(started.process.pid))
            time.sleep(0.05)
        assert started.process.returncode == 0, started.text[-3000:]
    print(
        f"written in {written - began:.0f} s, trained in {time.monotonic() - written:.0f} s, RssAnon {most / 2**20:.0f} MiB"
    )
    assert status(tmp_path / "run")["status"] == "finished"
    assert 0 < most < ANONYMOUS_BYTES
