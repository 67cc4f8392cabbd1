"""What a failing by-product does: one warning, and nothing else; what a failing file that was asked for does: an error."""

import pytest

from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import write_output
from distributed.process.byproducts import Byproduct, asked_for, reason


def test_a_by_product_that_is_made_says_nothing(said):
    with Byproduct("curves.png") as made:
        pass
    assert (made.failed, said) == (False, [])


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "/run/a"), "/run/a: No space left on device"),
        (OSError(28, "No space left on device", "curves.png"), "No space left on device"),
        (ModuleNotFoundError("No module named 'matplotlib'"), "ModuleNotFoundError: No module named 'matplotlib'"),
        (TypeError("the first line\nthe second"), "TypeError: the first line"),
        (MemoryError(), "MemoryError"),
        (StorageError("/run: full"), "StorageError: /run: full"),
    ],
)
def test_any_error_of_a_by_product_is_one_warning(said, error, why):
    with Byproduct("curves.png") as made:
        raise error
    assert made.failed
    assert said == [f"curves.png: {why}; continuing without it\n"]


@pytest.mark.parametrize("request_to_end", [KeyboardInterrupt, SystemExit])
def test_a_request_to_end_the_process_is_no_failure(said, request_to_end):
    with pytest.raises(request_to_end), Byproduct("curves.png"):
        raise request_to_end
    assert said == []


def test_after_a_step_that_failed_no_other_is_taken(said):
    taken: list[int] = []

    def step(number: int) -> None:
        taken.append(number)
        if number == 2:
            raise OSError(28, "No space left on device")

    byproduct = Byproduct("tensorboard")
    for number in range(5):
        byproduct.attempt(lambda number=number: step(number))
    assert taken == [0, 1, 2]
    assert len(said) == 1


def test_a_file_that_was_asked_for_is_an_error(tmp_path, capsys):
    with pytest.raises(StorageError) as caught, asked_for("--out", tmp_path):
        raise OSError(28, "No space left on device")
    assert caught.value.tell() == ExitCode.STORAGE
    expected = f"error: --out {tmp_path}: not written: No space left on device; free disk space, or name another file\n"
    assert capsys.readouterr().err == expected


def test_a_missing_package_is_no_fault_of_the_disk(tmp_path):
    with pytest.raises(InputError, match="ModuleNotFoundError: no matplotlib"), asked_for("--out", tmp_path):
        raise ModuleNotFoundError("no matplotlib")


def test_a_defect_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), asked_for("--out", tmp_path):
        raise ZeroDivisionError


def test_output_goes_through_a_link_and_leaves_it(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_output(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"


def test_output_into_a_device_leaves_the_device(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    write_output(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_char_device()


def test_a_reason_is_one_line():
    assert reason(ValueError("\n\n a\nb")) == "ValueError: a"
    assert reason(OSError("no number")) == "OSError: no number"
