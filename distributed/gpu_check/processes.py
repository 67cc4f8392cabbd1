"""Commands and ranks that a step starts, each with its output in a file; none outlives the step."""

import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

PYTHON = [sys.executable, "-m"]
"""How a module is run as a command."""


class Process:
    """A started process. `deadline` (of `time.monotonic`) bounds every wait for it."""

    def __init__(self, popen: "subprocess.Popen[bytes]", log: Path, deadline: float) -> None:
        self.popen, self._log, self._deadline = popen, log, deadline

    @property
    def text(self) -> str:
        """Its stdout and stderr so far."""
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """The exit code.

        Raises:
            AssertionError: the process is still running at the deadline.
        """
        try:
            return self.popen.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"out of time: {self._log.name} is still running\n{self.text[-1500:]}") from None

    def succeed(self) -> str:
        """Its output, once it has ended with exit code 0.

        Raises:
            AssertionError: another exit code, or out of time.
        """
        code = self.wait()
        assert code == 0, f"{self._log.name}: exit code {code}\n{self.text[-1500:]}"
        return self.text


class Processes:
    """Starts processes in the step's own process group; leaving the context ends those that still run.

    Args:
        folder: for the files with their output.
        seconds: no wait for any of them lasts longer than until then.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self._folder, self._deadline = folder, time.monotonic() + seconds
        self._started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        # Asked first: torchrun puts its ranks into sessions of their own and ends them if it is asked to end.
        for popen in self._started:
            popen.terminate()
        patience = time.monotonic() + 3
        for popen in self._started:
            with suppress(subprocess.TimeoutExpired):
                popen.wait(max(0.0, patience - time.monotonic()))
            popen.kill()
            popen.wait()

    def start(
        self, name: str, arguments: Sequence[object], *, environment: Mapping[str, object] | None = None
    ) -> Process:
        """Start a command; `environment` is set on top of this process's own."""
        log = self._folder / f"{name}.log"
        # By env(1), which becomes the command: the environment is for topology.py alone to read.
        variables = [f"{key}={value}" for key, value in (environment or {}).items()]
        with log.open("wb") as file:
            popen = subprocess.Popen(
                ["env", *variables, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._started.append(popen)
        return Process(popen, log, self._deadline)

    def start_ranks(self, name: str, count: int, module: str, *arguments: object) -> list[Process]:
        """Start a module once for each rank of a group on this host, as torchrun would, but in the step's process group."""
        port = free_port()
        return [
            self.start(
                f"{name}-rank-{rank}",
                [*PYTHON, module, *arguments],
                environment={
                    "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                },
            )
            for rank in range(count)
        ]  # fmt: skip


def free_port() -> int:
    """A TCP port of this host that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
