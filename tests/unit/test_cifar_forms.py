"""The Python layout and the archives give the same bytes as the binary layout; unverified pickles are never loaded."""

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from distributed.data.sources import cifar, cifar_files, cifar_spec, restricted_pickle
from distributed.errors import InputError

RECORDS = 6


def python2_pickle(value: object) -> bytes:
    """Pickle a value as Python 2's cPickle wrote the official files: text as BINSTRING, numpy under its old name."""

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

        def old_text(self, text: bytes | str) -> None:
            data = text.encode() if isinstance(text, str) else text
            self.write(b"T" + len(data).to_bytes(4, "little") + data)

        dispatch[bytes] = dispatch[str] = old_text

    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
    return request.param


@pytest.fixture
def contents(name, monkeypatch) -> dict[str, bytes]:
    """Small versions of all four forms under the official names, with their sizes and MD5s registered."""
    drawn = np.random.default_rng(7)
    official = cifar_spec.SETS[name]
    binary, python = official.forms
    files, md5 = {}, {}
    for bin_file, py_file in zip((*binary.train, binary.test), (*python.train, python.test), strict=True):
        labels = drawn.integers(0, official.classes, RECORDS).astype(np.uint8)
        planes = drawn.integers(0, 256, (RECORDS, 3072)).astype(np.uint8)
        coarse = np.array(cifar_spec.COARSE_OF_FINE, np.uint8)[labels][:, None][:, : official.label_bytes - 1]
        files[f"{binary.folder}/{bin_file}"] = np.hstack([coarse, labels[:, None], planes]).tobytes()
        value = {b"batch_label": b"x", official.label_key: labels.tolist(), b"data": planes, b"filenames": [b"a.png"]}
        files[f"{python.folder}/{py_file}"] = python2_pickle(value)
        md5[py_file] = hashlib.md5(files[f"{python.folder}/{py_file}"]).hexdigest()
    forms = []
    for form in (binary, python):
        files[form.archive] = archive({k: v for k, v in files.items() if k.startswith(f"{form.folder}/")})
        forms.append(replace(form, archive_md5=hashlib.md5(files[form.archive]).hexdigest()))
    small = replace(official, train_records=RECORDS, test_records=RECORDS, forms=(forms[0], replace(forms[1], md5=md5)))
    monkeypatch.setitem(cifar_spec.SETS, name, small)
    return files


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def write_form(root: Path, contents: dict[str, bytes], *prefixes: str) -> None:
    for path, content in contents.items():
        if path.startswith(prefixes):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)


def of_form(name: str, which: str) -> str:
    binary, python = cifar_spec.SETS[name].forms
    return {
        "binary folder": f"{binary.folder}/",
        "python folder": f"{python.folder}/",
        "binary archive": binary.archive,
        "python archive": python.archive,
    }[which]


FORMS = ["binary folder", "python folder", "binary archive", "python archive"]


def complaint(name: str, root: Path) -> str:
    def look() -> None:
        cifar.check(name, root)
        cifar.read_splits(name, root)

    with pytest.raises(InputError) as caught:
        look()
    (line,) = caught.value.lines
    assert f"data.name = {name}" in line
    assert "--data.root" in line
    return line


@pytest.mark.parametrize("which", FORMS[1:])
def test_every_form_gives_the_same_bytes_as_the_binary_folder(tmp_path, name, contents, which):
    write_form(tmp_path / "one", contents, of_form(name, FORMS[0]))
    write_form(tmp_path / "other", contents, of_form(name, which))
    assert cifar.is_there(name, tmp_path / "other")
    cifar.check(name, tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    ours, theirs = cifar.read_splits(name, tmp_path / "other"), cifar.read_splits(name, tmp_path / "one")
    for mine, expected, split in zip(ours, theirs, ("train", "test"), strict=True):
        assert mine.images.dtype == mine.labels.dtype == np.uint8
        assert np.array_equal(mine.images, expected.images)
        assert np.array_equal(mine.labels, expected.labels)
        assert np.array_equal(cifar.read(name, tmp_path / "other", split).images, expected.images)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked to the disk"


@pytest.mark.parametrize("which", FORMS)
def test_the_root_may_be_the_folder_or_archive_itself(tmp_path, name, contents, which, monkeypatch):
    write_form(tmp_path, contents, of_form(name, which))
    expected = cifar.read_splits(name, tmp_path)
    itself = tmp_path / of_form(name, which)
    roots = [itself]
    if itself.is_dir():
        monkeypatch.chdir(itself)
        roots.append(Path())
    for root in roots:
        assert cifar.is_there(name, root)
        cifar.check(name, root)
        for mine, theirs in zip(cifar.read_splits(name, root), expected, strict=True):
            assert np.array_equal(mine.images, theirs.images)


def test_a_folder_with_another_name_is_ignored(tmp_path, name, contents):
    write_form(tmp_path, contents, of_form(name, FORMS[0]))
    other = (tmp_path / of_form(name, FORMS[0])).rename(tmp_path / "other")
    assert not cifar.is_there(name, other)


def test_the_first_form_in_order_is_used(tmp_path, name, contents):
    for which in reversed(FORMS):
        write_form(tmp_path, contents, of_form(name, which))
        assert str(tmp_path / of_form(name, which)).startswith(str(cifar_files.files_in(name, tmp_path).path))


@pytest.mark.parametrize("which", FORMS[1:])
def test_a_changed_byte_is_refused_before_unpickling(tmp_path, name, contents, which, monkeypatch):
    write_form(tmp_path, contents, of_form(name, which))
    file = max(path for path in tmp_path.rglob("*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    read = restricted_pickle.load
    monkeypatch.setattr(
        restricted_pickle,
        "load",
        lambda data: pytest.fail("unpickled") if bytes(data) == bytes(content) else read(data),
    )
    line = complaint(name, tmp_path)
    assert f"{file}: its MD5 is {hashlib.md5(content).hexdigest()}, expected " in line


@pytest.mark.parametrize("which", FORMS[1:])
def test_a_truncated_file_is_refused(tmp_path, name, contents, which):
    write_form(tmp_path, contents, of_form(name, which))
    file = max(path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file) in complaint(name, tmp_path)


def test_a_missing_file_is_named_before_reading(tmp_path, name, contents):
    write_form(tmp_path, contents, of_form(name, "python folder"))
    missing = tmp_path / cifar_spec.SETS[name].forms[1].folder / cifar_spec.SETS[name].forms[1].test
    missing.unlink()
    with pytest.raises(InputError, match="No such file"):
        cifar.check(name, tmp_path)


def test_swapped_files_are_recognized(tmp_path, contents, name):
    form = cifar_spec.SETS[name].forms[1]
    write_form(tmp_path, contents, f"{form.folder}/")
    (tmp_path / form.folder / form.train[-1]).write_bytes(contents[f"{form.folder}/{form.test}"])
    assert f"that of {form.folder}/{form.test}" in complaint(name, tmp_path)


def test_another_archive_under_this_name_is_recognized(tmp_path, contents, name):
    binary, python = cifar_spec.SETS[name].forms
    (tmp_path / binary.archive).write_bytes(contents[python.archive])
    assert f"that of {python.archive}" in complaint(name, tmp_path)


def test_a_file_that_is_not_an_archive_is_refused_early(tmp_path, contents, name):
    (tmp_path / cifar_spec.SETS[name].forms[1].archive).write_text("<html>not found</html>")
    with pytest.raises(InputError, match="not a gzip archive"):
        cifar.check(name, tmp_path)


def test_an_archive_without_a_file_is_refused(tmp_path, contents, name, monkeypatch):
    small = cifar_spec.SETS[name]
    binary = small.forms[0]
    packed = archive({f"{binary.folder}/{binary.test}": contents[f"{binary.folder}/{binary.test}"]})
    forms = (replace(binary, archive_md5=hashlib.md5(packed).hexdigest()), small.forms[1])
    monkeypatch.setitem(cifar_spec.SETS, name, replace(small, forms=forms))
    (tmp_path / binary.archive).write_bytes(packed)
    assert f"{binary.train[0]}: not in the archive" in complaint(name, tmp_path)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def pickles(path: Path) -> list[bytes]:
    """Pickles that would create the file at `path`, or another value that is not plain."""
    return [
        pickle.dumps(Evil(str(path)), protocol=2),
        pickle.dumps(Evil(str(path))),
        b"cos\nsystem\n(S'touch " + os.fsencode(path) + b"'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy\ndtype.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.shape\x93.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
    ]


@pytest.mark.parametrize("which", range(8))
def test_a_malicious_pickle_runs_nothing(tmp_path, which):
    with pytest.raises(ValueError, match=r"needs |not a plain numpy array"):
        restricted_pickle.load(pickles(tmp_path / "made")[which])
    assert not (tmp_path / "made").exists()


def test_a_malicious_pickle_with_the_right_md5_is_refused(tmp_path, name, contents, monkeypatch):
    small = cifar_spec.SETS[name]
    python = small.forms[1]
    evil = pickle.dumps([Evil(str(tmp_path / "made")), bytes(RECORDS * 3072)], protocol=2)
    md5 = python.md5 | {python.test: hashlib.md5(evil).hexdigest()}
    monkeypatch.setitem(cifar_spec.SETS, name, replace(small, forms=(small.forms[0], replace(python, md5=md5))))
    write_form(tmp_path, contents, f"{python.folder}/")
    (tmp_path / python.folder / python.test).write_bytes(evil)
    assert "not CIFAR's pickle: it needs" in complaint(name, tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((RECORDS, 3071), np.uint8)}, "not a uint8 array of 6 x 3072"),
        ({"data": np.zeros((RECORDS, 3072))}, "not a uint8 array"),
        ({"data": "text"}, "not a uint8 array"),
        ({"labels": [0]}, "are not 6 numbers"),
        ({"labels": ["a"] * RECORDS}, "are not 6 numbers"),
        ({"labels": [-1] * RECORDS}, "label -1"),
        ({"labels": [100] * RECORDS}, "label 100"),
    ],
)
def test_a_pickle_with_other_content_is_refused(tmp_path, name, contents, monkeypatch, change, message):
    small = cifar_spec.SETS[name]
    python = small.forms[1]
    value = {small.label_key: [0] * RECORDS, b"data": np.zeros((RECORDS, 3072), np.uint8), b"padding": bytes(20_000)}
    value |= {small.label_key if key == "labels" else key.encode(): new for key, new in change.items()}
    packed = python2_pickle(value)
    md5 = python.md5 | {python.test: hashlib.md5(packed).hexdigest()}
    monkeypatch.setitem(cifar_spec.SETS, name, replace(small, forms=(small.forms[0], replace(python, md5=md5))))
    write_form(tmp_path, contents, f"{python.folder}/")
    (tmp_path / python.folder / python.test).write_bytes(packed)
    assert message in complaint(name, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02}q\x00", pickle.dumps(3)[:-1]])
def test_bytes_that_are_not_a_pickle_are_a_value_error(content):
    with pytest.raises(ValueError, match=r"\w"):
        restricted_pickle.load(content)


def test_plain_values_and_arrays_are_read():
    value = {b"a": [1, 2.5, b"x", None, True], b"b": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    found = restricted_pickle.load(python2_pickle(value))
    assert found[b"a"] == value[b"a"]
    assert np.array_equal(found[b"b"], value[b"b"])
    assert restricted_pickle.load(pickle.dumps({"a": [1, b"x"]})) == {"a": [1, b"x"]}


def test_the_binary_archive_is_fetched_unless_urls_differ():
    binary, python = cifar_spec.CIFAR10.forms
    official = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)
    assert cifar.archive_to_fetch("cifar10", ()) == (binary.archive, binary.archive_md5, official)
    urls = ("http://a/cifar-10-python.tar.gz", "http://b/cifar-10-python.tar.gz?x=1")
    assert cifar.archive_to_fetch("cifar10", urls) == (python.archive, python.archive_md5, urls)
    with pytest.raises(InputError, match="one archive"):
        cifar.archive_to_fetch("cifar10", ("http://a/cifar-10-python.tar.gz", "http://a/cifar-10-binary.tar.gz"))


@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT names no folder with CIFAR")
@pytest.mark.parametrize(
    ("of", "file"),
    [("cifar10", "cifar-10-batches-bin/batches.meta.txt"), ("cifar100", "cifar-100-binary/fine_label_names.txt")],
)
def test_the_class_names_are_official(of, file):
    names = (Path(os.environ["CIFAR_ROOT"]) / file).read_text().split()
    assert list(cifar_spec.SETS[of].class_names) == names


def test_the_digests_of_the_pickles_equal_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100

    for theirs, ours in ((CIFAR10, cifar_spec.CIFAR10), (CIFAR100, cifar_spec.CIFAR100)):
        form = ours.forms[1]
        assert dict(theirs.train_list + theirs.test_list) == form.md5
        assert (theirs.base_folder, theirs.filename, theirs.tgz_md5) == (form.folder, form.archive, form.archive_md5)
