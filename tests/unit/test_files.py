import errno
import os
import socket
import stat
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from distributed import files
from distributed.errors import InputError
from distributed.files import (
    append_line,
    home_path,
    lines_of,
    read_at_most,
    read_json,
    replace_bytes,
    replace_json,
    replace_text,
)
from distributed.process.output_file import check_writable, write_output


def test_json_reads_back_equal(tmp_path):
    replace_json(tmp_path / "a.json", {"a": [1, None, "ä"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_file_that_is_not_json_reads_as_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "missing.json") is None


def test_a_failed_replacement_leaves_only_the_old_file(tmp_path, monkeypatch):
    replace_text(tmp_path / "a", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_read_only_file_system_is_blamed_on_the_file(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "another")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        replace_bytes(tmp_path / "status.json", b"x", synced=False)
    assert caught.value.filename == str(tmp_path / "status.json")


def test_a_replacement_is_synced_before_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda *names: (order.append("rename"), replace(*names)))
    replace_text(tmp_path / "a", "new")
    assert order == ["fsync", "rename", "fsync"]


def test_lines_are_appended(tmp_path):
    for line in ("one", "zwei ä"):
        append_line(tmp_path / "a", line)
    assert (tmp_path / "a").read_text().splitlines() == ["one", "zwei ä"]


def test_a_line_that_was_not_finished_damages_no_other(tmp_path):
    (tmp_path / "a").write_text("one\ntw")
    append_line(tmp_path / "a", "three")
    assert (tmp_path / "a").read_text().splitlines() == ["one", "tw", "three"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_file_out_of_reach_is_not_empty(tmp_path, monkeypatch, number):
    def out_of_reach(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files.os, "open", out_of_reach)
    with pytest.raises(OSError, match=os.strerror(number)):
        list(lines_of(tmp_path / "a"))


# Paths


@pytest.mark.parametrize(
    ("text", "path"),
    [("~", "/home/me"), ("~/x", "/home/me/x"), ("a/~", "a/~"), ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
     ("~root", os.path.expanduser("~root")), ("./~", "~")],
)  # fmt: skip
def test_a_tilde_is_expanded_as_in_a_shell(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert home_path(text) == Path(path)


# Files that are not regular


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_is_neither_read_nor_appended_to(pipe: Path) -> None:
    assert read_json(pipe) is None
    assert list(lines_of(pipe)) == []
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        append_line(pipe, "line")
    with pytest.raises(OSError, match="not a regular file"):
        read_at_most(pipe, 10)


def test_a_file_beyond_the_limit_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10 * 2**30)
    assert read_json(tmp_path / "sparse") is None
    assert list(lines_of(tmp_path / "sparse")) == []
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_at_most(tmp_path / "sparse", 10)


def test_a_file_up_to_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert read_at_most(tmp_path / "a", 10) == b"0123456789"
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_at_most(tmp_path / "a", 9)


def test_lines_are_read_with_any_end_and_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\r\ntwo\n\n\xff\nlast")
    assert list(lines_of(tmp_path / "a")) == ["one", "two", "", "\ufffd", "last"]
    assert list(lines_of(tmp_path / "missing")) == []


# Output files of commands


def test_an_output_follows_a_link_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_an_output_follows_a_link_to_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    check_writable("--out", tmp_path / "link")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_text() == "new"


def test_an_output_is_written_into_a_pipe(pipe: Path) -> None:
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    check_writable("--out", pipe)
    while True:  # until the reader has opened it
        try:
            write_output(pipe, b"x" * 200_000)
            break
        except OSError:
            continue
    reader.join(10)
    assert found == [b"x" * 200_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_output_into_a_pipe_without_a_reader_is_an_error(pipe: Path) -> None:
    with pytest.raises(OSError, match="No such device or address"):
        write_output(pipe, b"x")


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.open("wb").close()
    except OSError:
        pytest.skip("only root can create devices")
    check_writable("--out", device)
    write_output(device, b"x")
    assert stat.S_ISCHR(device.stat().st_mode)
    with pytest.raises(InputError, match="is not a regular file"):
        check_writable("--out", device, regular=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("folder", "is a folder"), ("socket", "is not a regular file"), ("x" * 300, "File name too long"),
     ("x" * 240, "File name too long"), ("file/x", "File exists"), ("lost", "No such file"), ("circle", "symbolic links")],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    Path("lost").symlink_to("missing/file")
    Path("circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(InputError, match=message) as found:
            check_writable("--out", Path(name))
    assert "name a file that can be written" in str(found.value)


@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_usable(tmp_path, monkeypatch, number, is_raised):
    fsync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    with pytest.raises(OSError, match="Input/output") if is_raised else nullcontext():
        replace_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_a_picture_keeps_the_suffix_of_its_format(tmp_path: Path) -> None:
    for name in ("a.png", "a.PNG", "a"):
        check_writable("--picture", tmp_path / name, suffix=".png")
    with pytest.raises(InputError, match=r"a\.jpg: would be a \.png file; name one that ends in \.png"):
        check_writable("--picture", tmp_path / "a.jpg", suffix=".png")
