"""Signals and the launcher's death: which exit immediately, request a stop or are not handled."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kit.speed import slowness

from distributed.errors import ExitCode
from distributed.process.signals import SignalStop

ROOT = Path(__file__).parents[2]
ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _default_signals() -> Iterator[None]:
    """Restore the default handlers: a test run in the background may start with some signals ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
def test_signal_requests_stop_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with SignalStop(launched=True) as stop:
        assert stop.requested() is None
        os.kill(os.getpid(), number)
        assert stop.requested() == number.name
    assert signal.getsignal(number) == before


def test_a_handler_that_python_does_not_know_is_no_error(monkeypatch):
    """signal.signal returns None for a handler that a preloaded library has installed."""
    original = signal.signal
    unknown = {signal.SIGUSR1}

    def installed_by_c_code(number, handler):
        before = original(number, handler)
        return None if number in unknown and not unknown.discard(number) else before

    monkeypatch.setattr(signal, "signal", installed_by_c_code)
    with SignalStop(launched=False):
        pass
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_launcher_death_requests_a_stop(monkeypatch):
    with SignalStop(launched=True) as stop:
        other = os.getppid() + 1
        monkeypatch.setattr(os, "getppid", lambda: other)
        assert stop.requested() == "the launcher's death"


def test_shell_death_requests_nothing(monkeypatch):
    with SignalStop(launched=False) as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.requested() is None


REPEATED_SECONDS = 0.5 * slowness()
"""A second signal within this time is a duplicate, and an answer to the first one is not late."""
BLOCKED = f"""
import ctypes, sys, threading
from distributed.process import signals as module
module._UNRESPONSIVE_SECONDS = module._DUPLICATE_SECONDS = {REPEATED_SECONDS}
with module.SignalStop(launched=False) as signals:
    if sys.argv[1] == "saves":
        print("waits", flush=True)
        threading.Event().wait()  # like a save: Python runs its signal handlers meanwhile
    lock = ctypes.create_string_buffer(64)  # a mutex: a wait in C that no signal interrupts, like waiting for a GPU
    threads = ctypes.CDLL(None)
    threads.pthread_mutex_lock(lock)
    print("waits", flush=True)
    threads.pthread_mutex_lock(lock)
"""


@contextmanager
def blocked(kind: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED, kind], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout.readline() == "waits\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, ExitCode.FAILED), (signal.SIGINT, ExitCode.INTERRUPTED)])
def test_second_signal_ends_a_process_blocked_in_c(number, code):
    with blocked("in C") as process:
        process.send_signal(number)
        time.sleep(0.3 + REPEATED_SECONDS)
        assert process.poll() is None
        for _ in range(10):  # on a busy machine two may be read together and count as one
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
                break
        assert process.poll() == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_duplicate_signal_is_one_request(number):
    with blocked("in C") as process:
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)
        time.sleep(0.3 + REPEATED_SECONDS)
        assert process.poll() is None
        process.kill()


def test_second_sigterm_does_not_interrupt_a_save():
    with blocked("saves") as process:
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3 + REPEATED_SECONDS)
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_terminal_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with SignalStop(launched=False, exit_before_first_step=True) as stop:
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert stop.requested() is None
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ignored_launcher_signal_is_handled(number):
    signal.signal(number, signal.SIG_IGN)
    with SignalStop(launched=False) as stop:
        os.kill(os.getpid(), number)
        assert stop.requested() == number.name


def test_repeated_sighup_is_one_request():
    with SignalStop(launched=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        assert stop.requested() == "SIGHUP"


def test_parent_with_pid_1_is_not_a_dead_launcher(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with SignalStop(launched=True) as stop:
        assert stop.requested() is None


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGWINCH, signal.SIGCHLD])
def test_other_signals_are_not_handled(number):
    with SignalStop(launched=False, exit_before_first_step=True) as stop:
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        assert stop.requested() is None


def test_sigquit_is_left_to_the_system():
    before = signal.getsignal(signal.SIGQUIT)
    with SignalStop(launched=False):
        assert signal.getsignal(signal.SIGQUIT) == before


WAITING = """
import ctypes, sys, time
from distributed.process import exits
from distributed.process.signals import SignalStop
exits.add_exit_hook(lambda final: print(*final[:2], sep="|", flush=True))
with SignalStop(launched="orphan" in sys.argv, exit_before_first_step=True) as stop:
    if "stepped" in sys.argv:
        stop.requested()
    print("waits", flush=True)
    if "stuck" in sys.argv:
        exits.add_exit_hook(lambda final: time.sleep(60))
    lock = ctypes.create_string_buffer(64)  # waits in C, like waiting for a peer: no Python handler runs
    threads = ctypes.CDLL(None)
    threads.pthread_mutex_lock(lock)
    threads.pthread_mutex_lock(lock)
"""


@contextmanager
def waiting(*how: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        try:
            assert process.stdout.readline() == "waits\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", ALL)
def test_signal_before_the_first_step_exits_immediately(number, tmp_path):
    code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.STOPPED
    with waiting(TORCHELASTIC_ERROR_FILE=str(tmp_path / "0" / "error.json")) as process:
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(10 * slowness()) == code
        assert time.monotonic() - begin < 2 * slowness()
        message = f"stopped by {number.name} before the first step; nothing to save"
        assert process.communicate() == (f"{code!r}|{message}\n".replace(repr(code), str(int(code))), f"{message}\n")
    assert json.loads((tmp_path / "0" / "error.json").read_text())["message"]["message"] == message


HOLDING = """
import sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()  # like a library's: it masks no signal
from distributed.process.signals import SignalStop
with SignalStop(launched=False, exit_before_first_step=True, holds_sigterm=True) as stop:
    print("holds", flush=True)
    sys.stdin.readline()
    print("released", flush=True)
    stop.release_sigterm()
    threading.Event().wait()
"""


def test_sigterm_is_held_until_it_is_released():
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            assert process.stdout.readline() == "holds\n"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None
            output, errors = process.communicate("go\n", timeout=30 * slowness())
        finally:
            process.kill()
    assert output == "released\n"
    assert errors == "stopped by SIGTERM before the first step; nothing to save\n"
    assert process.returncode == ExitCode.STOPPED


def test_a_held_sigterm_does_not_delay_another_end():
    """E.g. of a refused config, when torchrun ends the other ranks."""
    begin = time.monotonic()
    with SignalStop(launched=False, exit_before_first_step=True, holds_sigterm=True):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert time.monotonic() - begin < 5


def test_hanging_exit_hook_does_not_delay_the_exit_long():
    with waiting("stuck") as process:
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10 * slowness()) == ExitCode.STOPPED
        assert time.monotonic() - begin < 4 * slowness()


def test_sighup_after_the_first_step_only_requests_a_stop():
    with waiting("stepped") as process:
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.7)
        assert process.poll() is None


def test_second_ctrl_c_says_how_to_resume():
    with waiting("stepped") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert process.wait(10 * slowness()) == ExitCode.INTERRUPTED
        assert "the same command resumes from the last checkpoint" in process.stderr.read()


def test_waiting_rank_exits_when_its_launcher_dies():
    program = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {WAITING!r}, 'orphan'])\n"
        "print('child', child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    ) as parent:  # fmt: skip
        lines = {parent.stdout.readline().split()[0] for _ in range(2)}
        assert lines == {"child", "waits"}
        parent.kill()
        assert "stopped by the launcher's death before the first step" in parent.stdout.read()
