"""A process that has imported torch, from which ranks are forked: to import it anew takes longer than most of what they do."""

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

_READ_AT_ITS_START = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    # Memory that goes back to the system after each step takes time to come again.
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}


class Nursery:
    """Forks processes on request; they end with it, and it with the process that made it.

    Args:
        born: called in each forked process with what `bear` was given and the open file for the answer.
        preload: modules; none may start a thread or touch a GPU, which a fork does not survive.
    """

    def __init__(self, born: Callable[[Any, Connection], None], preload: tuple[str, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._requests, there = context.Pipe()
        self._process = context.Process(target=_tend, args=(there, born, preload), daemon=True)
        with _environment(**_READ_AT_ITS_START):
            self._process.start()
        there.close()
        self._born = 0
        self._is_ready = False

    def get_ready(self) -> None:
        """Wait until it has imported what it is to preload; where several are needed, start all of them before."""
        if not self._is_ready:
            with self._asking():
                self._requests.recv()
            self._is_ready = True

    def bear(self, task: Any) -> tuple[int, Connection]:
        """Its number, and where its answer comes."""
        self.get_ready()
        here, there = multiprocessing.Pipe(duplex=False)
        with there, self._asking():
            self._born += 1
            self._requests.send(("bear", self._born, task))
            send_handle(self._requests, there.fileno(), self._process.pid)
        return self._born, here

    def exit_code(self, number: int) -> int:
        """Of a process that is about to end."""
        with self._asking():
            self._requests.send(("wait", number, None))
            return int(self._requests.recv())

    def kill(self, number: int) -> None:
        """Returns when it is gone."""
        with self._asking():
            self._requests.send(("kill", number, None))
            self._requests.recv()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # a test's timeout too: the next answer might be of this request
            self._process.kill()
            self._process.join()
            raise


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _tend(requests: Connection, born: Callable[[Any, Connection], None], preload: tuple[str, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this one
    with contextlib.redirect_stdout(None):
        for module in preload:
            __import__(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes along one thread only"
    gc.freeze()  # what is here is no garbage of theirs
    requests.send("ready")
    living: dict[int, int] = {}
    ended: dict[int, int] = {}

    def end(number: int, *, by_force: bool) -> int:
        if number in living:
            pid = living.pop(number)
            if by_force:
                os.kill(pid, signal.SIGKILL)
            ended[number] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return ended[number]

    with contextlib.suppress(EOFError):
        while True:
            what, number, task = requests.recv()
            if what == "bear":
                answer = Connection(recv_handle(requests), readable=False)
                pid = os.fork()
                if pid == 0:
                    requests.close()
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    _live(born, task, answer)
                answer.close()
                living[number] = pid
            else:
                requests.send(end(number, by_force=what == "kill"))
    for number in list(living):
        end(number, by_force=True)
    os._exit(0)  # else triton tells at length what it leaks


def _live(born: Callable[[Any, Connection], None], task: Any, answer: Connection) -> None:
    code = 1
    random.seed()  # else all begin with what this process had
    try:
        born(task, answer)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
