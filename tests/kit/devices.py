"""Keeps tests on the CPU unless they are marked `gpu`, even on a machine with a GPU.

On such a machine `device = auto` means CUDA: fast mode instead of exact mode, and other bits. GPUs are therefore hidden from
processes that tests start, and a test that trains without naming its device fails on every machine.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TRAINING = {"distributed.train", "launch.ray_train", "kit.killed_in_save", "kit.slow_save", "kit.small_cifar"}
_LINES = {'device = "cpu"', 'device = "cuda"'}


@contextmanager
def no_gpus() -> Iterator[None]:
    """Hide all GPUs from processes started inside the context, and from this process unless it has already used CUDA."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def check_command(command: Sequence[object]) -> None:
    """Raise AssertionError for a command that trains without a device in `--device` or in its config file."""
    arguments = [os.fsdecode(each) if isinstance(each, bytes | os.PathLike) else str(each) for each in command]
    if _trains(arguments) and not {"-h", "--help"} & set(arguments):
        assert _names_device(arguments), f"add --device cpu, or cuda in a test marked gpu: {' '.join(arguments)}"


def check_setting(device: str) -> None:
    """Raise AssertionError if a run inside the test's own process has device = auto."""
    assert device != "auto", "add --device cpu, or cuda in a test marked gpu"


def check_started_commands() -> None:
    """Call `check_command` on every command that this process starts from now on."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and not isinstance(arguments[1], str | bytes):
            check_command(arguments[1])

    sys.addaudithook(hook)


def _trains(arguments: list[str]) -> bool:
    scripts = [each for each in arguments if each.endswith(".sh") and Path(each).parent.name == "slurm"]
    return (
        bool(_TRAINING & set(arguments))
        or (arguments[0] == "sbatch" and bool(scripts))
        or Path(arguments[0]).name == "distributed-train"
    )


def _names_device(arguments: list[str]) -> bool:
    given = " ".join(arguments).replace("--device=", "--device ")
    if "--device " in given:
        return "--device auto" not in given
    files = [Path(each) for each in arguments if each.endswith(".toml") and Path(each).is_file()]
    return any(line in _LINES for file in files for line in file.read_text().splitlines())
