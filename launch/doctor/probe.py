"""`python -m launch.doctor.probe`: what one node finds out about itself and its peers, in lines for `launch.doctor.reports`.

Whatever goes wrong on a node is a finding of that node, so nothing here ends in an exception. torch is imported late: a node
without it can say so.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, from_command_line
from distributed.data.sources import registry
from distributed.errors import InputError
from distributed.host.cpu_quota import available_cpus
from distributed.host.versions import versions
from distributed.topology import cluster_job
from launch.doctor.reports import Report, lines_of
from launch.environment import place


def main() -> int:
    """Prints the report; always 0, the verdict is the doctor's."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.probe", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", default="", help="name of the file that the doctor wrote into the run folder")
    parser.add_argument("--seconds", type=float, default=20.0, help="wait for the other nodes")
    given, words = parser.parse_known_args()
    index, count, node = place()
    report: Report = {"node": node, "index": index}
    find(report, "versions", versions)
    find(report, "code", digest_of_code)
    find(report, "devices", devices)
    find(report, "folder", lambda: folder(from_command_line(words).config.run_dir, given.token, node))
    find(report, "data", lambda: data_of(words))
    if count > 1:
        network = importlib.import_module("launch.doctor.network")
        find(report, "network", lambda: network.measure(given.address, given.port, index, count, given.seconds))
    sys.stdout.write(lines_of(report))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that wait for a dead peer must not keep the process


def find(report: Report, name: str, ask: Callable[[], Any]) -> None:
    """Put into the report what `ask` returns, or the error that it ended in."""
    try:
        report[name] = ask()
    except InputError as error:
        report[name] = {"error": " ".join(str(error).splitlines())}
    except Exception as error:  # of a node in any state
        report[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def digest_of_code() -> str:
    """Of all source files of the project that this node runs."""
    digest = hashlib.blake2b(digest_size=6)
    for package in ("distributed", "launch"):
        root = Path(importlib.import_module(package).__file__ or "").parent
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def devices() -> Report:
    """Number, name and memory of GPUs; cores and memory of the host."""
    import torch

    cuda = torch.cuda
    gpus = [cuda.get_device_properties(index) for index in range(cuda.device_count())] if cuda.is_available() else []
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "gpus": len(gpus),
        "gpu": gpus[0].name if gpus else "",
        "gpu_memory_gib": round(min(gpu.total_memory for gpu in gpus) / 2**30, 1) if gpus else 0.0,
        "cores": available_cpus(),
        "memory_gib": round(pages / 2**30, 1),
    }


def folder(run_dir: Path, token: str, node: str) -> Report:
    """Whether this node sees the doctor's file in the run folder and can put its own beside it; free space there."""
    found: Report = {"path": str(run_dir.absolute()), "sees_token": True}
    if token:
        deadline = time.monotonic() + 5  # network file systems show a new file late
        while not (run_dir / token).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        found["sees_token"] = (run_dir / token).exists()
        if found["sees_token"]:
            (run_dir / f"{token}.{node}").write_text(socket.gethostname())
    there = next(one for one in (run_dir.absolute(), *run_dir.absolute().parents) if one.exists())
    return found | {"free_gib": round(shutil.disk_usage(there).free / 2**30, 1), "writable": os.access(there, os.W_OK)}


def data_of(arguments: Sequence[str]) -> str:
    """As `data`, for the config that a command line describes."""
    command = from_command_line(arguments)
    return data(command.config, names_data=command.names_data)


def data(config: TrainConfig, *, names_data: bool = True) -> str:
    """Check that the data set is there and its files have the right sizes; outside a job, generated images may replace it."""
    if not names_data and not cluster_job():
        return "none named"
    registry.prepare(config.data)
    return config.data.name


if __name__ == "__main__":
    raise SystemExit(main())
