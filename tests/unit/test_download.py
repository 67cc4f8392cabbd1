"""Downloads from a real local server that can stall, break the connection, return errors and ignore ranges."""

import hashlib
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kit.http_server import CONTENT, HALF, Server, serving

from distributed.config.data import CifarData
from distributed.data.sources import cifar_spec, download, once_per_node, progress, registry
from distributed.errors import InputError

MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def get(urls: list[str], target: Path, **settings: float) -> None:
    download.fetch(urls, target, md5=MD5, **{"stall_seconds": 0.3, "pause_seconds": 0.01, **settings})


def complaint(urls: list[str], target: Path, **settings: float) -> list[str]:
    with pytest.raises(InputError) as caught:
        get(urls, target, **settings)
    assert not target.exists()
    *lines, remedy = caught.value.lines
    assert "--data.urls" in remedy
    assert "online" in remedy
    assert str(target.parent) in remedy
    return [line.removeprefix(f"download of {target.name}: ") for line in lines]


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "data" / "file.tar.gz"


def test_a_file_is_downloaded_once(server, target, capsys):
    get([server.url("good")], target)
    assert target.read_bytes() == CONTENT
    assert not target.with_name("file.tar.gz.part").exists()
    get([server.url("good")], target)
    assert server.requests == [("/good/file.tar.gz", None)]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "file.tar.gz: 1.0 MB"
    assert re.fullmatch(r"file\.tar\.gz: 1\.0 MB after \d+ s", lines[-1])


@pytest.mark.parametrize("manner", ["redirect", "unsized", "slow"])
def test_redirected_unsized_and_slow_responses_are_accepted(server, target, manner):
    get([server.url(manner)], target, stall_seconds=2)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("manner", ["breaksonce", "stallsonce"])
def test_a_broken_download_resumes_at_the_same_byte(server, target, manner):
    get([server.url(manner)], target)
    assert target.read_bytes() == CONTENT
    assert [byte_range for _, byte_range in server.requests] == [None, f"bytes={HALF}-"]


def test_a_process_resumes_the_download_of_a_killed_one(server, target):
    target.parent.mkdir()
    target.with_name("file.tar.gz.part").write_bytes(CONTENT[:1000])
    get([server.url("good")], target)
    assert target.read_bytes() == CONTENT
    assert server.requests[0][1] == "bytes=1000-"


def test_a_complete_partial_file_needs_no_server(target):
    target.parent.mkdir()
    target.with_name("file.tar.gz.part").write_bytes(CONTENT)
    get(["http://127.0.0.1:9/none"], target)
    assert target.read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_starts_over(server, target):
    target.parent.mkdir()
    target.with_name("file.tar.gz.part").write_bytes(CONTENT[:1000])
    get([server.url("norange")], target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"x" * 1000, CONTENT + b"more", b"x" * len(CONTENT)])
def test_a_partial_file_of_another_is_downloaded_again(server, target, part):
    target.parent.mkdir()
    target.with_name("file.tar.gz.part").write_bytes(part)
    get([server.url("good")], target)
    assert target.read_bytes() == CONTENT


def test_a_response_with_another_range_is_rejected(server, target):
    target.parent.mkdir()
    target.with_name("file.tar.gz.part").write_bytes(CONTENT[:1000])
    get([server.url("otherpart")], target)
    assert target.read_bytes() == CONTENT
    assert [byte_range for _, byte_range in server.requests] == ["bytes=1000-", None]


@pytest.mark.parametrize(
    ("manner", "text", "times"),
    [
        ("404", "HTTP 404 Not Found", 1),
        ("500", "HTTP 500 Internal Server Error", 3),
        ("503", "HTTP 503 Service Unavailable", 3),
        ("breaks", f"the connection broke after {HALF:,} of {len(CONTENT):,} bytes", 4),
        ("stalls", "it sent nothing for 0.3 s", 4),
        (
            "wrong",
            f"the file it sent has MD5 {hashlib.md5(b'<html>another file</html>').hexdigest()}, expected {MD5}",
            1,
        ),
    ],
)
def test_a_server_error_is_reported_and_retried_if_temporary(server, target, manner, text, times):
    (line,) = complaint([server.url(manner)], target)
    assert line.startswith(f"{server.url(manner)}: ")
    assert text in line
    assert server.manners() == [manner] * times
    assert target.with_name("file.tar.gz.part").exists() == (manner in ("breaks", "stalls"))


@pytest.mark.parametrize("manner", ["404", "500", "wrong", "breaks", "stalls", "unsized", "norange"])
def test_the_next_mirror_is_tried_at_once(server, target, manner):
    get([server.url(manner), server.url("good")], target)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == (1 if manner in ("unsized", "norange") else 2)


def test_each_mirror_is_reported_on_its_own_line(server, target):
    lines = complaint([server.url("404"), server.url("500"), "http://127.0.0.1:9/none"], target, rounds=2)
    assert [line.split(": ")[0] for line in lines] == [server.url("404"), server.url("500"), "http://127.0.0.1:9/none"]
    assert "Connection refused" in lines[2]
    assert server.manners() == ["404", "500", "500"]


def test_a_download_that_makes_progress_is_never_given_up(server, target):
    server.step = 100_000
    get([server.url("bits")], target, rounds=1)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 11


def test_an_unknown_host_is_reported(target):
    (line,) = complaint(["http://nowhere.invalid/file"], target, rounds=1)
    assert "not known" in line or "resolution" in line or "No address" in line


def test_a_folder_that_cannot_be_written_is_reported(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="make it writable"):
        get([server.url("good")], tmp_path / "file" / "file.tar.gz")
    assert server.requests == []


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_a_pipe_folder_or_device_as_partial_file_is_refused(server, target, make):
    target.parent.mkdir()
    make(target.with_name(f"{target.name}.part"))
    with pytest.raises(InputError, match="not a regular file; make the folder writable"):
        get([server.url("good")], target)


def test_a_full_disk_is_not_blamed_on_the_server(server, target, monkeypatch):
    class Full:
        name = "the part"

        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(download, "_opened", lambda *_: Full())
    with pytest.raises(InputError, match=r"the part: No space left on device; free disk space"):
        get([server.url("good")], target)
    assert len(server.requests) == 1


def _in_a_process(urls: list[str], target: Path, start: float, answers: "multiprocessing.Queue[object]") -> None:
    time.sleep(max(0, start - time.time()))
    try:
        get(urls, target, rounds=1)
        answers.put("there" if target.read_bytes() == CONTENT else "another")
    except InputError as error:
        answers.put(error.lines)


def four_processes(urls: list[str], target: Path) -> list[object]:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[object] = context.Queue()
    start = time.time() + 0.3
    processes = [context.Process(target=_in_a_process, args=(urls, target, start, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(10)
    return found


def test_one_of_four_processes_downloads_for_all(server, target):
    assert four_processes([server.url("slow")], target) == ["there"] * 4
    assert len(server.requests) == 1


def test_all_of_four_processes_report_the_failure_of_one(server, target):
    """The others do not each wait for the same stalled server."""
    answers = four_processes([server.url("stalls")], target)
    assert [byte_range for _, byte_range in server.requests] == [None, f"bytes={HALF}-"]
    assert "it sent nothing for 0.3 s" in answers[0][0]
    assert [list(answer) for answer in answers] == [list(answers[0])] * 4


def test_waiting_processes_do_not_check_under_the_lock(tmp_path):
    """The check may read a file of hundreds of gigabytes, and the next one waits for the lock meanwhile."""
    target, checked, working = tmp_path / "target", [], threading.Event()

    def done() -> bool:
        checked.append(target.exists())
        return target.exists()

    def work() -> None:
        working.set()
        while len(checked) < 3:  # the other one has checked, and is about to wait
            time.sleep(0.01)
        time.sleep(0.2)
        target.touch()

    threads = [
        threading.Thread(target=once_per_node.once_per_node, args=(target, work), kwargs={"done": done})
        for _ in range(2)
    ]
    threads[0].start()
    assert working.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert checked == [False, False, False]


def test_another_attempt_after_a_failure_tries_again(server, target):
    complaint([server.url("404")], target)
    get([server.url("good")], target)
    assert target.read_bytes() == CONTENT


def test_the_age_of_a_failure_does_not_depend_on_clocks(server, target):
    """If a file server's clock is ahead, the note of an old failure has a time in the future."""
    complaint([server.url("404")], target)
    (note,) = target.parent.glob("*.failed")
    ahead = time.time() + 300
    os.utime(note, (ahead, ahead))
    get([server.url("good")], target)
    assert target.read_bytes() == CONTENT


def test_a_mirror_is_tried_while_the_file_fails_elsewhere(server, target):
    """Two commands need the same file, and the first one's server has stalled."""
    arguments = ([server.url("stalls")], target)
    options = {"md5": MD5, "stall_seconds": 1.0, "rounds": 1}
    first = multiprocessing.get_context("fork").Process(target=download.fetch, args=arguments, kwargs=options)
    first.start()
    deadline = time.monotonic() + 20
    while not server.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    get([server.url("good")], target)
    first.join(20)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["", "[]", "null", '{"number": []}', '{"number": 1, "lines": 3}', "[[[["])
def test_a_damaged_note_of_a_failure_is_ignored(server, target, note):
    target.parent.mkdir()
    target.with_name(f".{target.name}.failed").write_text(note)
    get([server.url("good")], target)
    assert target.read_bytes() == CONTENT


def test_a_failure_is_reported_on_a_full_disk_too(server, target, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(once_per_node, "replace_json", full)
    assert "HTTP 404" in complaint([server.url("404")], target)[0]


def test_a_file_system_without_locks_is_reported(server, target, monkeypatch):
    def without(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(once_per_node.FileLock, "acquire", without)
    with pytest.raises(InputError, match="its file system has no locks"):
        get([server.url("good")], target)


def test_a_killed_download_is_resumed_by_the_next_process(server, target):
    waiting = {"md5": MD5, "stall_seconds": 20.0}
    arguments = ([server.url("stalls")], target)
    process = multiprocessing.get_context("fork").Process(target=download.fetch, args=arguments, kwargs=waiting)
    process.start()
    part = target.with_name("file.tar.gz.part")
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size == HALF):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    get([server.url("good")], target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1][1] == f"bytes={HALF}-"


def test_the_progress_line_estimates_the_remaining_time():
    megabyte = 1_000_000
    message = progress.line("x", 34 * megabyte, 170 * megabyte, "B", 55_000)
    assert message == "x: 34.0 MB of 170.0 MB, 55 kB/s, 41 min left"
    assert progress.line("x", 5, 10, "images", 2.5) == "x: 5 images of 10 images, 2 images/s, 2 s left"
    assert progress.line("x", 0, 10, "images", 0).endswith("stalled")
    assert progress.line("x", 2000, None, "B", 1000) == "x: 2 kB, 1 kB/s"


def test_without_a_terminal_progress_is_printed_in_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    with progress.progress("decoding", 3, unit="images") as advance:
        for _ in range(3):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("decoding: 1 images of 3 images, ")


def test_on_a_terminal_a_bar_is_drawn(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.progress("decoding", 3, unit="images") as advance:
        advance(3)
    assert "100%" in capsys.readouterr().err


def test_a_missing_data_set_is_downloaded_only_on_request(server, tmp_path, monkeypatch):
    packed = b"\x1f\x8b" + CONTENT
    server.content = packed
    official = cifar_spec.CIFAR10.forms[0]
    form = replace(official, archive_md5=hashlib.md5(packed).hexdigest())
    small = replace(cifar_spec.CIFAR10, forms=(form, cifar_spec.CIFAR10.forms[1]))
    monkeypatch.setitem(cifar_spec.SETS, "cifar10", small)
    config = CifarData(root=tmp_path / "data")
    with pytest.raises(InputError, match=r"--data\.download"):
        registry.prepare(config)
    downloading = config.model_copy(update={"download": True, "urls": (server.url("good"),)})
    registry.prepare(downloading)
    assert (tmp_path / "data" / official.archive).read_bytes() == packed
    registry.prepare(downloading)
    assert len(server.requests) == 1
    assert not list((tmp_path / "data").glob("*.part"))
