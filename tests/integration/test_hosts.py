"""Several hosts under torchrun without Slurm: a link that is cut and restored, and a host that is lost."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.commands import NARROW, Command, alone, assert_same_bits, attempts, has_saved, status, torchrun
from kit.hosts import Hosts, hosts_unavailable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(hosts_unavailable()), reason=f"no hosts here: {hosts_unavailable()}"),
]
SETTINGS = (
    "configs/debug.toml", "--epochs", 8, "--checkpoint.every_steps", 5, *NARROW, "--threads", 1, "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(alone(*SETTINGS, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return run


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as both:
        yield both


def on_each(
    hosts: Hosts, run: Path, conf: str, *options: str, settings: tuple[object, ...] = SETTINGS
) -> list[Command]:
    """Start the command of docs/slurm.md on each host; the first one hosts the rendezvous."""
    commands = []
    for host in hosts.names:
        rendezvous = (
            "--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint={hosts.address('n1')}:29400",
            f"--local-addr={hosts.address(host)}", f"--rdzv-conf=is_host={int(host == 'n1')},{conf}",
        )  # fmt: skip
        command = torchrun(1, *settings, "--run_dir", run, options=(*rendezvous, *options))
        environment = ["env", "GLOO_SOCKET_IFNAME=eth0"]
        commands.append(Command(hosts.on(host, [*environment, *command]), output=run.parent / host))
    return commands


def wait_for_save(run: Path, command: Command) -> None:
    """Wait until the run has saved in mid-epoch."""
    command.wait_for(lambda: has_saved(run), what="a save")


def test_a_link_cut_for_20_seconds_costs_20_seconds(hosts: Hosts, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = on_each(hosts, run, "keep_alive_interval=5,keep_alive_max_attempt=12", "--nnodes=2")
    with first, second:
        wait_for_save(run, first)
        hosts.cut("n2")
        time.sleep(1)
        at = status(run)["step"]
        time.sleep(19)
        assert status(run)["step"] == at, "no rank takes a step alone"
        assert status(run)["status"] == "running"
        hosts.restore("n2")
        assert first.wait() == 0, first.text[-4000:]
        assert second.wait() == 0, second.text[-4000:]
    assert len(attempts(run, "started")) == 1
    assert_same_bits(run, undisturbed)


def test_after_a_host_is_lost_the_other_resumes_alone(hosts: Hosts, undisturbed: Path, tmp_path: Path) -> None:
    """A power failure sends no packet: the other host's rank waits for `timeout_seconds`, then torchrun restarts it."""
    run = tmp_path / "run"
    conf = "last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3"
    options = ("--nnodes=1:2", "--max-restarts=3", "--monitor-interval=0.5")
    first, second = on_each(hosts, run, conf, *options, settings=(*SETTINGS, "--timeout_seconds", 15))
    with first, second:
        wait_for_save(run, first)
        assert status(run)["world_size"] == 2
        hosts.lose("n2")
        assert first.wait(150) == 0, first.text[-4000:]
    assert [one["world_size"] for one in attempts(run, "started")] == [2, 1]
    assert_same_bits(run, undisturbed)
