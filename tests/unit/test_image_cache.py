"""The cache of decoded images: its location, which files it trusts, and that it returns only decoded images."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kit.image_folders import read_folder
from PIL import Image

from distributed.data.sources import decode, image_cache
from distributed.data.sources.image_cache import CacheFile, folders
from distributed.errors import InputError
from distributed.host.identity import boot_id

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images, and the user's home and temporary folder beside it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for split in ("train", "test"):
        for shade, name in enumerate(("cat", "dog")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for place in range(3):
                file = tmp_path / "data" / split / name / f"{place}.png"
                Image.new("RGB", (8, 8), (40 * place, 90 * shade, 0)).save(file)
    return tmp_path / "data"


def pixels(root: Path, cache: Path | None = None, side: int = 8) -> np.ndarray:
    return np.array(read_folder(root, side, cache)[0].images)


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("train-*.images")
    return file


def changed(at: int, to: bytes) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with file.open("r+b") as opened:
            opened.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
            opened.write(to)

    return change


def another(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def linked_to_a_copy(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pixel changed": (changed(-1, b"\x77"), "its content does not match its header"),
    "the first pixel changed": (changed(4096, b"\x77"), "its content does not match its header"),
    "the header changed": (changed(3, b"\x77"), "its content does not match its header"),
    "zeros": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "its content does not match its header"),
    "truncated": (lambda file: os.truncate(file, 300), "its size is wrong"),
    "empty": (lambda file: os.truncate(file, 0), "its size is wrong"),
    "longer": (lambda file: os.truncate(file, 10**6), "its size is wrong"),
    "a link": (linked_to_a_copy, "Too many levels of symbolic links"),
    "a link to nothing": (another(lambda file: file.symlink_to("gone")), "Too many levels of symbolic links"),
    "a pipe": (another(os.mkfifo), "not a regular file"),
    "writable by all": (lambda file: file.chmod(0o666), "another user can write it"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_an_untrusted_cache_file_is_replaced(case: str, root: Path, log_messages: list[str]) -> None:
    change, why = DAMAGE[case]
    expected = pixels(root)
    file = the_file(root / ".decoded")
    change(file)
    assert np.array_equal(pixels(root), expected)
    assert log_messages == [f"{file}: {why}; decoding the images again\n"]
    assert stat.S_ISREG(file.lstat().st_mode)
    assert np.array_equal(pixels(root), expected)
    assert len(log_messages) == 1


def test_the_failure_of_a_run_with_another_limit_is_not_shared(root: Path) -> None:
    requests = set()
    for limit in (10, 20):
        with pytest.raises(InputError, match=f"{limit} allows"):
            read_folder(root, 8, max_pixels=limit)
        (note,) = (root / ".decoded").glob(".train-*.failed")
        requests.add(json.loads(note.read_text())["request"])
    assert len(requests) == 2


@needs_root
def test_another_users_cache_file_is_ignored(root: Path, log_messages: list[str]) -> None:
    expected = pixels(root)
    os.chown(the_file(root / ".decoded"), NOBODY, NOBODY)
    assert np.array_equal(pixels(root), expected)
    assert "another user can write it" in log_messages[0]


def test_a_cache_file_of_another_size_or_source_is_ignored(root: Path, log_messages: list[str]) -> None:
    expected = pixels(root, side=4)
    small = the_file(root / ".decoded")
    content = small.read_bytes()
    small.unlink()
    pixels(root, side=8)
    large = the_file(root / ".decoded")
    large.write_bytes(content)
    assert pixels(root, side=8).shape[1] == 8
    assert "its size is wrong" in log_messages[0]
    Image.new("RGB", (8, 8), (1, 2, 3)).save(root / "train" / "cat" / "0.png")
    small.write_bytes(content)
    found = pixels(root, side=4)
    assert not np.array_equal(found, expected)


def test_a_renamed_cache_file_is_ignored(root: Path, log_messages: list[str]) -> None:
    pixels(root)
    old = the_file(root / ".decoded")
    content = old.read_bytes()
    old.unlink()
    os.utime(root / "train" / "cat" / "0.png", (1, 1))
    expected = pixels(root)
    the_file(root / ".decoded").write_bytes(content)
    assert np.array_equal(pixels(root), expected)
    assert len(log_messages) == 1


def test_a_folder_as_cache_file_keeps_the_images_in_memory(root: Path, log_messages: list[str]) -> None:
    expected = pixels(root)
    file = the_file(root / ".decoded")
    file.unlink()
    file.mkdir()
    assert np.array_equal(pixels(root, root / ".decoded"), expected)
    assert "Is a directory" in log_messages[-1]
    assert "each process decodes them at every start" in log_messages[-1]


def paths(root: Path, named: Path | None) -> list[Path]:
    return [folder.path for folder in folders(root, named)]


def test_the_cache_is_with_the_data_else_in_the_users_folder(root: Path, tmp_path: Path, monkeypatch) -> None:
    home = tmp_path / "home" / ".cache" / "distributed" / "decoded"
    assert paths(root, None)[:2] == [root / ".decoded", home]
    assert paths(root, tmp_path / "named") == [tmp_path / "named"]
    assert stat.S_IMODE((tmp_path / "named").stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")  # no folder can be created in it, as in a read-only one
    assert paths(tmp_path / "file", None)[0] == home
    assert paths(root, tmp_path / "file" / "below") == []
    with pytest.raises(InputError, match=r"--data\.cache"):
        read_folder(root, 8, tmp_path / "file" / "below")


def test_no_second_folder_is_created_if_the_first_is_writable(root: Path, tmp_path: Path, monkeypatch) -> None:
    pixels(root)
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "temporary").exists()


def test_without_a_home_the_cache_is_in_the_temporary_folder(root: Path, monkeypatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    nowhere = root / "train" / "cat" / "0.png"
    assert paths(nowhere, None) == [root.parent / "temporary" / f"distributed-decoded-{os.geteuid()}"]


def test_without_any_folder_the_images_are_in_memory(root: Path, log_messages: list[str], monkeypatch) -> None:
    expected = pixels(root)

    def nowhere(*_: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    shutil.rmtree(root / ".decoded")
    (root / ".decoded").write_text("")
    assert np.array_equal(pixels(root), expected)
    (line, _) = log_messages  # one per split
    assert "decoded images are not cached (no folder that can be written)" in line


OTHERS: dict[str, Callable[[Path], object]] = {
    "writable by all": lambda folder: folder.chmod(0o777),
    "writable by its group": lambda folder: folder.chmod(0o770),
    "sticky": lambda folder: folder.chmod(0o1777),
    "another user's": lambda folder: (os.chown(folder, NOBODY, NOBODY), folder.chmod(0o777)),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_private_folder_is_created_in_a_shared_one(case: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    OTHERS[case](shared)
    private = shared / f"distributed-decoded-{os.geteuid()}"
    assert paths(tmp_path, shared) == [private]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.parametrize("case", ["a link", "writable by all", "another user's"])
@needs_root
def test_a_private_folder_created_by_others_is_ignored(case: str, root: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    private = shared / f"distributed-decoded-{os.geteuid()}"
    if case == "a link":
        (tmp_path / "elsewhere").mkdir()
        private.symlink_to(tmp_path / "elsewhere")
    else:
        private.mkdir()
        private.chmod(0o777 if case == "writable by all" else 0o700)
    if case == "another user's":
        os.chown(private, NOBODY, NOBODY)
    assert paths(root, shared) == []
    with pytest.raises(InputError, match=r"or other users can; name another folder with --data\.cache"):
        read_folder(root, 8, shared)
    assert [*private.glob("*"), *(tmp_path.glob("elsewhere/*"))] == []


def test_temporary_files_of_dead_processes_are_removed(root: Path, tmp_path: Path) -> None:
    import fcntl

    pixels(root)
    file = the_file(root / ".decoded")
    file.unlink()
    other_images = file.with_name(f".train-8-0.images.{boot_id()}.dead.writing")
    dead, living = (file.with_name(f".{file.name}.{boot_id()}.{name}.writing") for name in ("dead", "living"))
    elsewhere, old = (file.with_name(f".{file.name}.another-machine.{name}.writing") for name in ("new", "old"))
    for path in (other_images, dead, elsewhere, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    with living.open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        pixels(root)
    left = [path for path in (other_images, dead, living, elsewhere, old) if path.exists()]
    assert left == [living, elsewhere]


def test_images_larger_than_memory_are_mapped(tmp_path: Path, monkeypatch) -> None:
    """A private mapping that can be written would be refused."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = sum(1024 * int(lines[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    side = 4096
    file = CacheFile(tmp_path / "a.images", os.geteuid(), (memory // (3 * side**2) + 100, side, side, 3), "source")
    monkeypatch.setattr(image_cache, "_digest", lambda _: "digest")
    with file.path.open("wb") as made:
        made.write(file._header("digest"))
        try:
            made.truncate(image_cache._HEADER + int(np.prod(file.shape)))
        except OSError:
            pytest.skip("the file system has no files of that size")
    file.path.chmod(0o600)
    assert file.load().shape == file.shape


def test_an_error_that_passes_replaces_no_cache(root: Path, monkeypatch, log_messages: list[str]) -> None:
    """Other nodes may have mapped the file: a replaced one is gone on NFS."""
    expected = pixels(root)
    before = the_file(root / ".decoded").stat().st_ino
    mapped = np.memmap

    def refused(file, *arguments):
        if os.readlink(f"/proc/self/fd/{file.fileno()}").startswith(str(root)):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mapped(file, *arguments)

    monkeypatch.setattr(np, "memmap", refused)
    assert np.array_equal(pixels(root), expected)
    assert the_file(root / ".decoded").stat().st_ino == before
    assert len(list((root.parent / "home").rglob("*.images"))) == 2


def test_two_concurrent_writers_leave_one_valid_file(tmp_path: Path) -> None:
    file = CacheFile(tmp_path / "a.images", os.geteuid(), (130, 2, 2, 3), "source")
    images = np.arange(130 * 12, dtype=np.uint32).astype(np.uint8).reshape(file.shape)

    def blocks(store: Callable[[int, np.ndarray], None]) -> None:
        for first in range(0, 130, image_cache.BLOCK):
            store(first, images[first : first + image_cache.BLOCK])

    def inside(store: Callable[[int, np.ndarray], None]) -> None:
        file.write(blocks)  # as a second process would: locks may not work between nodes
        written.append(file.path.stat().st_ino)
        blocks(store)

    written: list[int] = []
    file.write(inside)
    assert [file.path.stat().st_ino] == written, "its readers would lose a replaced file on NFS"
    assert np.array_equal(file.load(), images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.images"]


def test_on_a_full_disk_the_images_are_in_memory(root: Path, log_messages: list[str], small_disk: Path) -> None:
    expected = pixels(root)
    shutil.rmtree(root / ".decoded")
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    assert np.array_equal(pixels(root, small_disk / "cache"), expected)
    assert re.search(r"data\.cache: decoded images are not cached \(.*No space left on device\)", log_messages[0])
    assert not list((small_disk / "cache").glob("*.images"))


def test_a_full_first_folder_leads_to_the_next(root: Path, log_messages: list[str], monkeypatch) -> None:
    real = CacheFile.write

    def write(file: CacheFile, blocks: Callable[..., None]) -> None:
        if file.path.parent == root / ".decoded":
            raise OSError(28, "No space left on device")
        real(file, blocks)

    monkeypatch.setattr(CacheFile, "write", write)
    pixels(root)
    assert len(list((root.parent / "home").rglob("*.images"))) == 2
    assert log_messages == []


def test_images_too_large_for_disk_and_memory_are_refused(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(decode, "_available_memory", lambda: 1000.0)
    monkeypatch.setattr(CacheFile, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"data\.cache: no room for .* No space left on device"):
        read_folder(root, 8)
