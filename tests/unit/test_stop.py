import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed.collectives import LateMax
from distributed.errors import ExitCode
from distributed.stop import Never, SignalStop, StepAgreement

ROOT = Path(__file__).parents[2]


class Asked:
    def __init__(self) -> None:
        self.reason: str | None = None

    def requested(self) -> str | None:
        return self.reason


def test_a_late_maximum_is_that_of_the_call_before():
    late = LateMax(2)
    assert late.exchange(1, 0) == [0, 0]
    assert late.exchange(0, 1) == [1, 0]
    assert late.drain() == [0, 1]
    assert late.drain() == [0, 0]


def test_a_request_takes_effect_one_step_late():
    source = Asked()
    agreement = StepAgreement(source, is_main=True, save_every_seconds=0)
    assert agreement.after_step() == (False, False)
    source.reason = "SIGTERM"
    assert agreement.after_step() == (False, False)
    assert agreement.reason is None
    assert agreement.after_step() == (True, False)
    assert agreement.reason == "SIGTERM"


def test_nobody_asks_where_no_request_can_come():
    agreement = StepAgreement(Never(), is_main=True, save_every_seconds=0)
    assert [agreement.after_step() for _ in range(3)] == [(False, False)] * 3


def test_a_save_is_due_by_the_clock_once_a_period(monkeypatch):
    now = 0.0
    monkeypatch.setattr("distributed.stop.time.monotonic", lambda: now)
    agreement = StepAgreement(Never(), is_main=True, save_every_seconds=10)
    decided = []
    for now in (4.0, 11.0, 12.0, 20.0, 22.0, 23.0):  # noqa: B007  read by the clock
        decided.append(agreement.after_step()[1])
    assert decided == [False, False, True, False, False, True]


def test_a_checkpoint_starts_the_clock_anew(monkeypatch):
    now = 0.0
    monkeypatch.setattr("distributed.stop.time.monotonic", lambda: now)
    agreement = StepAgreement(Never(), is_main=True, save_every_seconds=10)
    now = 9.0
    agreement.saved()
    now = 15.0
    assert [agreement.after_step() for _ in range(2)] == [(False, False)] * 2


def test_only_rank_0_looks_at_the_clock(monkeypatch):
    agreement = StepAgreement(Never(), is_main=False, save_every_seconds=1e-9)
    assert [agreement.after_step() for _ in range(3)] == [(False, False)] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_to_stop_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with SignalStop(launched=True) as stop:
        assert stop.requested() is None
        os.kill(os.getpid(), number)
        assert stop.requested() == number.name
    assert signal.getsignal(number) == before


def test_the_death_of_the_launcher_asks_to_stop(monkeypatch):
    with SignalStop(launched=True) as stop:
        other = os.getppid() + 1
        monkeypatch.setattr(os, "getppid", lambda: other)
        assert stop.requested() == "the launcher's death"


def test_a_command_outlives_the_shell_it_was_typed_in(monkeypatch):
    with SignalStop(launched=False) as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.requested() is None


DEAF = """
import ctypes, sys, threading
from distributed import stop
stop._DEAF_SECONDS = 0.5
with stop.SignalStop(launched=False) as signals:
    if sys.argv[1] == "saves":
        print("waits", flush=True)
        threading.Event().wait()  # as for a save: Python runs its handlers meanwhile
    lock = ctypes.create_string_buffer(64)  # a mutex: a wait in C that no signal interrupts, like one for a GPU
    threads = ctypes.CDLL(None)
    threads.pthread_mutex_lock(lock)
    print("waits", flush=True)
    threads.pthread_mutex_lock(lock)
"""


def deaf(kind: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", DEAF, kind], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, ExitCode.FAILED), (signal.SIGINT, ExitCode.INTERRUPTED)])
def test_a_second_signal_ends_a_process_that_waits_in_c(number, code):
    with deaf("unheard") as process:
        process.send_signal(number)
        time.sleep(0.8)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sent_twice_at_once_is_one_request(number):
    with deaf("unheard") as process:
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)
        time.sleep(0.8)
        assert process.poll() is None
        process.kill()


def test_a_second_sigterm_does_not_interrupt_a_save():
    with deaf("saves") as process:
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.8)
        assert process.poll() is None
        process.kill()
