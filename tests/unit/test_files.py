import os

import pytest

from distributed import files
from distributed.files import append_line, read_json, replace_json, replace_text


def test_json_goes_there_and_back(tmp_path):
    replace_json(tmp_path / "a.json", {"a": [1, None, "ä"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_what_is_no_json_reads_as_nothing(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "missing.json") is None


def test_a_replacement_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    replace_text(tmp_path / "a", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_replacement_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
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
