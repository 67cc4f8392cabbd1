"""Invalid launcher variables, endpoints, listeners and early signals: one clear line each, and no rank waits forever."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from kit.abuse import assert_outcome, call, untouched
from kit.commands import ROOT, Command, status, torchrun
from kit.other_program import other_program
from kit.speed import slowness

from distributed.gpu_check.processes import free_port

DEBUG = ROOT / "configs" / "debug.toml"
FIRST = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SECOND = FIRST | {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


# Before torch

PLACES: dict[str, tuple[dict[str, str], str]] = {
    "an empty rank": ({"RANK": ""}, "RANK = '': should be a whole number"),
    "a spelled-out rank": ({"RANK": "first"}, "RANK = 'first'"),
    "a rank with an underscore": ({"RANK": "0_0"}, "RANK = '0_0'"),
    "a rank in Arabic digits": ({"RANK": "\u0661"}, "RANK = '\u0661'"),
    "a fractional rank": ({"RANK": "0.0"}, "RANK = '0.0'"),
    "a rank of 40 digits": ({"RANK": "1" * 40}, "should be a whole number"),
    "a negative rank": ({"RANK": "-1"}, "RANK = -1: should be at least 0"),
    "a rank beyond the world": ({"RANK": "2"}, "RANK = 2: should be at least 0 and less than WORLD_SIZE = 2"),
    "no ranks": ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0"),
    "a negative number of ranks": ({"WORLD_SIZE": "-2"}, "WORLD_SIZE = -2"),
    "a number of ranks with an exponent": ({"WORLD_SIZE": "2e0"}, "WORLD_SIZE = '2e0'"),
    "a negative local rank": ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = -1"),
    "a local rank beyond its node": ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK = 1"),
    "no local ranks": ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE = 0"),
    "spelled-out local ranks": ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE = 'all'"),
    "a node name": ({"GROUP_RANK": "node-1"}, "GROUP_RANK = 'node-1'"),
    "an empty node": ({"NODE_RANK": ""}, "NODE_RANK = ''"),
    "no address": ({"MASTER_ADDR": ""}, "MASTER_ADDR = ''"),
    "an unknown host": ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR = 'no-such-host.invalid'"),
    "an address with a scheme": ({"MASTER_ADDR": "tcp://127.0.0.1"}, "MASTER_ADDR = 'tcp://127.0.0.1'"),
    "an address with a port": ({"MASTER_ADDR": "127.0.0.1:29500"}, "MASTER_ADDR = '127.0.0.1:29500'"),
    "an address in brackets": ({"MASTER_ADDR": "[::1]"}, "MASTER_ADDR = '[::1]'"),
    "an address of 300 characters": ({"MASTER_ADDR": "a" * 300}, "name the host of rank 0"),
    "an address with an empty label": ({"MASTER_ADDR": "a..b"}, "MASTER_ADDR = 'a..b'"),
    "port 0": ({"MASTER_PORT": "0"}, "MASTER_PORT = '0'"),
    "a negative port": ({"MASTER_PORT": "-1"}, "MASTER_PORT = '-1'"),
    "a port beyond 65535": ({"MASTER_PORT": "65536"}, "MASTER_PORT = '65536'"),
    "a port with many zeros": ({"MASTER_PORT": "0000029500"}, "MASTER_PORT = '0000029500'"),
    "a superscript port": ({"MASTER_PORT": "\u00b2"}, "MASTER_PORT = '\u00b2'"),
    "a hexadecimal port": ({"MASTER_PORT": "0x733c"}, "MASTER_PORT = '0x733c'"),
    "a port with a newline": ({"MASTER_PORT": "29500\n"}, "MASTER_PORT = '29500\\n'"),
}


@pytest.mark.parametrize(("environment", "message"), PLACES.values(), ids=PLACES)
def test_invalid_environment_is_one_line(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = ModuleType("distributed.run_process")
    process.run_to_exit_code = lambda *_: 99  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distributed.run_process", process)
    monkeypatch.setattr("distributed.topology._RESOLVE_SECONDS", 0.0)
    error_file = tmp_path / "0" / "error.json"
    given = {**FIRST, **environment, "TORCHELASTIC_ERROR_FILE": str(error_file)}
    with untouched(tmp_path / "run"):
        found = call("train", DEBUG, "--device", "cpu", "--run_dir", tmp_path / "run", **given)
    assert_outcome(found, message)
    (line,) = found.errors
    assert f"error: {json.loads(error_file.read_text())['message']['message']}" == line


# The rendezvous


def train(run: Path, environment: dict[str, str], port: str, *, seconds: float = 0.5) -> tuple[object, float]:
    begin = time.monotonic()
    arguments = ("--device", "cpu", "--threads", 1, "--timeout_seconds", seconds, "--run_dir", run)
    return call("train", DEBUG, *arguments, **(environment | {"MASTER_PORT": port})), time.monotonic() - begin


FOREIGN: dict[str, bytes] = {
    "a web server": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an SSH server": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a server of zeros": b"\0" * 64,
    "a server that closes": b"",
}


@pytest.mark.parametrize("answer", FOREIGN.values(), ids=FOREIGN)
def test_foreign_program_at_the_endpoint(answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.comm.peers._NOTIFY_SECONDS", 0.1)
    with other_program(answer) as port:
        found, _ = train(tmp_path / "run", SECOND, str(port), seconds=60)
    assert_outcome(found, f"MASTER_PORT = {port}: another program listens there", "torchrun --master_port PORT")


def test_silent_program_at_the_endpoint(tmp_path: Path) -> None:
    with other_program(None) as port:
        found, _ = train(tmp_path / "run", SECOND, str(port))
    message = (
        f"rank 0 of 2 did not arrive at 127.0.0.1:{port} within 0.5 s (the program that listens there does not answer)"
    )
    assert_outcome(found, message, code=1)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.comm.peers._NOTIFY_SECONDS", 0.1)
    with other_program(None, address=address) as port:
        found, _ = train(tmp_path / "run", FIRST, str(port))
    assert_outcome(found, f"MASTER_PORT = {port}: Address already in use", "--standalone")
    assert (status(tmp_path / "run")["status"], status(tmp_path / "run")["exit_code"]) == ("failed", 2)


@pytest.mark.parametrize(
    ("place", "missing"),
    [
        (FIRST, "rank 1 of 2"),
        (FIRST | {"WORLD_SIZE": "4"}, "rank 1, 2, 3 of 4"),
        (SECOND, "rank 0 of 2"),
        (SECOND | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, "torchrun's agent"),
    ],
)
def test_missing_ranks_are_named(place: dict[str, str], missing: str, tmp_path: Path) -> None:
    port = str(free_port())
    found, _ = train(tmp_path / "run", place, port)
    assert_outcome(found, f"{missing} did not arrive at 127.0.0.1:{port} within 0.5 s", code=1)


# Real processes


def started(environment: dict[str, str], port: str, output: Path, *arguments: object) -> Command:
    command = [sys.executable, "-m", "distributed.train", str(DEBUG), "--device", "cpu", "--threads", "1"]
    return Command([*command, *map(str, arguments)], output=output, more={**environment, "MASTER_PORT": port})


@pytest.mark.timeout(200)
def test_signals_while_waiting_for_a_peer(tmp_path: Path) -> None:
    """One rank per signal, all at the same time."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in numbers
    }  # so that no signal is inherited as ignored
    commands = [
        started(FIRST, str(free_port()), tmp_path / number.name, "--run_dir", tmp_path / f"run-{number.name}")
        for number in numbers
    ]
    for number, handler in before.items():
        signal.signal(number, handler)
    try:
        for number, command in zip(numbers, commands, strict=True):
            attempt = tmp_path / f"run-{number.name}" / "attempt.json"
            command.wait_for(attempt.exists, what="the claim of the run folder")
        time.sleep(1)  # until it waits at the rendezvous
        for number, command in zip(numbers, commands, strict=True):
            begin = time.monotonic()
            command.process.send_signal(number)
            assert command.wait(60) == (130 if number == signal.SIGINT else 75)
            assert time.monotonic() - begin < 2 * slowness()
            assert command.text == f"stopped by {number.name} before the first step; nothing to save\n"
            assert not (tmp_path / f"run-{number.name}" / "status.json").exists()
    finally:
        for command in commands:
            command.__exit__()


@pytest.mark.timeout(200)
def test_error_on_rank_0_ends_its_peer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    port = str(free_port())
    with (
        started(FIRST, port, tmp_path / "0", "--run_dir", tmp_path / "file" / "run") as first,
        started(SECOND, str(port), tmp_path / "1", "--run_dir", tmp_path / "run") as second,
    ):
        assert [first.wait(), second.wait(20)] == [2, 2]
        assert "run_dir" in first.text
        assert "rank 0: run_dir = " in second.text
        assert "Traceback" not in first.text + second.text


@pytest.mark.timeout(200)
def test_torchrun_prints_the_reason_last(tmp_path: Path) -> None:
    arguments = torchrun(1, DEBUG, "--device", "cpu", "--epochs", 0, "--run_dir", tmp_path / "run")
    with Command(arguments, output=tmp_path / "output") as command:
        assert command.wait() == 1
    *_, last, line = command.text.strip().splitlines()
    assert last.strip() == "traceback : command line: epochs = 0: should be greater than 0"
    assert set(line) == {"="}


@pytest.mark.timeout(200)
def test_closed_terminal_requests_a_stop(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, pty, sys\n"
        "pid, terminal = pty.fork()\n"
        "if pid == 0:\n"
        "    os.execv(sys.executable, [sys.executable, '-m', 'distributed.train', *sys.argv[1:]])\n"
        "lines = pathlib.Path(sys.argv[-1], 'metrics.jsonl')\n"
        "while not lines.exists() or not lines.read_text():\n"
        "    os.read(terminal, 4096)\n"
        "os.close(terminal)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    arguments = [str(DEBUG), "--device", "cpu", "--threads", "1", "--epochs", "200", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, timeout=150, check=False, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL), env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    found = status(tmp_path / "run")
    assert (found["status"], found["reason"], found["exit_code"]) == ("stopped", "SIGHUP", 75)
    assert found["step"] > 0
