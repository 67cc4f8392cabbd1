"""Which device a test trains on: tests mean the CPU unless they are marked `gpu`, on a machine with a GPU too.

There `device = auto` is CUDA: fast mode instead of exact mode, and other bits. So GPUs are hidden from what a test starts,
and a test that trains without naming the device fails on every machine.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TRAINING = {"distributed.train", "launch.ray_train", "kit.killed_in_save", "kit.small_cifar"}
_LINES = {'device = "cpu"', 'device = "cuda"'}


@contextmanager
def no_gpus() -> Iterator[None]:
    """Hide all GPUs from processes that are started meanwhile, and from this one if it has not asked for them before."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def check_command(words: Sequence[object]) -> None:
    """Raise AssertionError for a command that trains and names its device neither by `--device` nor in its config file."""
    said = [os.fsdecode(word) if isinstance(word, bytes | os.PathLike) else str(word) for word in words]
    if _trains(said) and not {"-h", "--help"} & set(said):
        assert _names_device(said), f"add --device cpu, or cuda in a test marked gpu: {' '.join(said)}"


def check_setting(device: str) -> None:
    """Raise AssertionError if the device setting of a training in a test's own process is auto."""
    assert device != "auto", "add --device cpu, or cuda in a test marked gpu"


def check_started_commands() -> None:
    """Call `check_command` on every command that this process starts from now on, by whatever function."""

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and not isinstance(arguments[1], str | bytes):
            check_command(arguments[1])

    sys.addaudithook(heard)


def _trains(words: list[str]) -> bool:
    scripts = [word for word in words if word.endswith(".sh") and Path(word).parent.name == "slurm"]
    return (
        bool(_TRAINING & set(words))
        or (words[0] == "sbatch" and bool(scripts))
        or Path(words[0]).name == "distributed-train"
    )


def _names_device(words: list[str]) -> bool:
    given = " ".join(words).replace("--device=", "--device ")
    if "--device " in given:
        return "--device auto" not in given
    files = [Path(word) for word in words if word.endswith(".toml") and Path(word).is_file()]
    return any(line in _LINES for file in files for line in file.read_text().splitlines())
