"""Commands and ranks started by a step. Their output goes to files, and none outlives the step."""

import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from distributed.process.session import end_with_parent

PYTHON = [sys.executable, "-m"]
"""Start of a command that runs a module."""


class Process:
    """A started process. `deadline` (a `time.monotonic()` value) limits each wait for it."""

    def __init__(self, popen: "subprocess.Popen[bytes]", log: Path, deadline: float) -> None:
        self.popen, self._log, self._deadline = popen, log, deadline

    @property
    def text(self) -> str:
        """stdout and stderr so far."""
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code.

        Raises:
            AssertionError: it is still running at the deadline.
        """
        try:
            return self.popen.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"timeout: {self._log.name} is still running\n{self.text[-1500:]}") from None

    def succeed(self) -> str:
        """Wait for exit code 0 and return the output.

        Raises:
            AssertionError: the exit code is not 0, or the process is still running at the deadline.
        """
        code = self.wait()
        assert code == 0, f"{self._log.name}: exit code {code}\n{self.text[-1500:]}"
        return self.text


class Processes:
    """Starts processes in the step's own process group. Leaving the context ends those still running.

    Args:
        folder: for files with their output.
        seconds: time limit for all of them together.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self._folder, self._deadline = folder, time.monotonic() + seconds
        self._started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        # SIGTERM first: torchrun puts its ranks into sessions of their own, and ends them when it is terminated.
        for popen in self._started:
            popen.terminate()
        kill_at = time.monotonic() + 3
        for popen in self._started:
            with suppress(subprocess.TimeoutExpired):
                popen.wait(max(0.0, kill_at - time.monotonic()))
            popen.kill()
            popen.wait()

    def start(
        self, name: str, arguments: Sequence[object], *, environment: Mapping[str, object] | None = None
    ) -> Process:
        """Start a command, with `environment` added to this process's."""
        log = self._folder / f"{name}.log"
        # Through env(1), which becomes the command: only topology.py may read os.environ.
        variables = [f"{key}={value}" for key, value in (environment or {}).items()]
        with log.open("wb") as file:
            popen = subprocess.Popen(
                ["env", *variables, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, preexec_fn=end_with_parent,
            )  # fmt: skip
        self._started.append(popen)
        return Process(popen, log, self._deadline)

    def start_ranks(self, name: str, count: int, module: str, *arguments: object) -> list[Process]:
        """Start a module on each rank of a group on this host, as torchrun would, but in the step's own process group."""
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
    """Return a TCP port of this host that is free at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
