"""`python -m launch.doctor.probe`: one node examines itself and its network, and prints its report.

Any failure is a finding about the node, so nothing here raises. torch is imported late, so that a node without it can
report that.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distributed.config import CommandLine, TrainConfig, from_command_line
from distributed.config.data import CifarData
from distributed.data.sources import cifar, registry
from distributed.errors import InputError
from distributed.host.cpu_quota import available_cpus
from distributed.host.importable import module_files
from distributed.host.versions import versions
from distributed.topology import cluster_job
from launch.doctor.reports import Devices, Folder, NodeReport, to_lines
from launch.environment import step_node

_TOKEN_SECONDS = 5.0  # network file systems show a new file late


def main() -> int:
    """Print the report; the exit code is always 0, since the doctor decides."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.probe", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", default="", help="name of the file that the doctor wrote into the run folder")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to wait for the other nodes")
    options, settings = parser.parse_known_args()
    node = step_node()

    def command() -> CommandLine:
        return from_command_line(settings)

    sections: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "code": code_digest,
        "devices": find_devices,
        "folder": lambda: examine_folder(command().config.run_dir, options.token, node.name),
        "model": lambda: model_digest(command().config),
    }
    if node.count > 1:
        network = importlib.import_module("launch.doctor.network")
        sections["network"] = lambda: network.measure(
            options.address, options.port, node.index, node.count, options.seconds,
            uses_gpus=command().config.device != "cpu",
        )  # fmt: skip
    # Last: listing an image folder may take longer than the others wait in the network.
    sections["data"] = lambda: check_data(command().config, names_data=command().names_data)
    sys.stdout.write(to_lines(examine(node.name, node.index, sections)))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that wait for a dead peer must not keep the process alive


def examine(node: str, index: int, sections: Mapping[str, Callable[[], Any]]) -> NodeReport:
    """Call the function of each section, and return the report of their results and errors."""
    found: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for section, measure in sections.items():
        try:
            found[section] = measure()
        except InputError as error:
            errors[section] = " ".join(str(error).splitlines())
        except Exception as error:  # whatever state the node is in
            errors[section] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return NodeReport(node=node, index=index, errors=errors, **found)


def code_digest() -> str:
    """Return a digest of all source files of the project that this node runs."""
    digest = hashlib.blake2b(digest_size=6)
    for package in ("distributed", "launch"):
        root = Path(importlib.import_module(package).__file__ or "").parent
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def model_digest(config: TrainConfig) -> str:
    """Check that imported modules are there, and return the digests of their files."""
    files = module_files(config.import_paths)
    return " ".join(file.sha256[:12] or "no file" for file in files.values()) or "built in"


def find_devices() -> Devices:
    """Return the GPUs, cores and memory of this node."""
    import torch

    cuda = torch.cuda
    gpus = [cuda.get_device_properties(index) for index in range(cuda.device_count())] if cuda.is_available() else []
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Devices(
        gpus=len(gpus),
        gpu_memory_gib=round(min(gpu.total_memory for gpu in gpus) / 2**30, 1) if gpus else 0.0,
        cores=available_cpus(),
        memory_gib=round(memory / 2**30, 1),
    )


def examine_folder(run_dir: Path, token: str, node: str) -> Folder:
    """Examine the run folder: whether this node sees the doctor's file there, can write beside it, and the free space.

    Args:
        token: name of the doctor's file; empty if there is none to look for.
    """
    sees_token = True
    if token:
        deadline = time.monotonic() + _TOKEN_SECONDS
        while not (run_dir / token).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        sees_token = (run_dir / token).exists()
        if sees_token:
            (run_dir / f"{token}.{node}").write_text(socket.gethostname())
    path = run_dir.absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free_gib = round(shutil.disk_usage(existing).free / 2**30, 1)
    return Folder(path=str(path), sees_token=sees_token, writable=os.access(existing, os.W_OK), free_gib=free_gib)


def check_data(config: TrainConfig, *, names_data: bool = True) -> str:
    """Check that the data set is present and its files have the right sizes, and return its name.

    Args:
        names_data: whether the user named a config or data set; if not, generated images may replace CIFAR-10 outside a job.
    """
    if not names_data and not cluster_job():
        return "none named"
    if (
        isinstance(config.data, CifarData)
        and config.data.download
        and not cifar.is_there(config.data.name, config.data.root)
    ):
        return "to be downloaded"
    registry.prepare(config.data)
    return config.data.name


if __name__ == "__main__":
    raise SystemExit(main())
