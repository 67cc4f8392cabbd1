from distributed.comm.delayed_max import open_delayed_max
from distributed.training.stop import NeverStop, StepAgreement


class RequestedStop:
    def __init__(self) -> None:
        self.reason: str | None = None

    def requested(self) -> str | None:
        return self.reason


def test_a_delayed_maximum_is_that_of_the_previous_call():
    late = open_delayed_max(2, timeout_seconds=30)
    assert late.exchange(1, 0) == [0, 0]
    assert late.exchange(0, 1) == [1, 0]
    assert late.drain() == [0, 1]
    assert late.drain() == [0, 0]


def test_a_request_takes_effect_one_step_late():
    source = RequestedStop()
    agreement = StepAgreement(source, is_main=True, save_every_seconds=0, timeout_seconds=30)
    assert agreement.after_step() == (False, False)
    source.reason = "SIGTERM"
    assert agreement.after_step() == (False, False)
    assert agreement.reason is None
    assert agreement.after_step() == (True, False)
    assert agreement.reason == "SIGTERM"


def test_without_requests_nothing_stops():
    agreement = StepAgreement(NeverStop(), is_main=True, save_every_seconds=0, timeout_seconds=30)
    assert [agreement.after_step() for _ in range(3)] == [(False, False)] * 3


def test_a_timed_save_is_due_once_per_period(monkeypatch):
    now = 0.0
    monkeypatch.setattr("distributed.training.stop.time.monotonic", lambda: now)
    agreement = StepAgreement(NeverStop(), is_main=True, save_every_seconds=10, timeout_seconds=30)
    decided = []
    for now in (4.0, 11.0, 12.0, 20.0, 22.0, 23.0):  # noqa: B007  read by the clock
        decided.append(agreement.after_step()[1])
    assert decided == [False, False, True, False, False, True]


def test_a_save_restarts_the_timer(monkeypatch):
    now = 0.0
    monkeypatch.setattr("distributed.training.stop.time.monotonic", lambda: now)
    agreement = StepAgreement(NeverStop(), is_main=True, save_every_seconds=10, timeout_seconds=30)
    now = 9.0
    agreement.restart_save_timer()
    now = 15.0
    assert [agreement.after_step() for _ in range(2)] == [(False, False)] * 2


def test_only_rank_0_reads_the_clock(monkeypatch):
    agreement = StepAgreement(NeverStop(), is_main=False, save_every_seconds=1e-9, timeout_seconds=30)
    assert [agreement.after_step() for _ in range(3)] == [(False, False)] * 3
