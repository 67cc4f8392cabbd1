"""A failing optional output is one warning; a failing requested output is an error."""

import pytest

from distributed.errors import ExitCode, InputError, StorageError
from distributed.process.optional_output import OptionalOutput, one_line, requested_output
from distributed.process.output_file import write_output


def test_successful_output_logs_nothing(log_messages):
    with OptionalOutput("curves.png") as output:
        pass
    assert (output.failed, log_messages) == (False, [])


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
def test_any_error_is_one_warning(log_messages, error, why):
    with OptionalOutput("curves.png") as output:
        raise error
    assert output.failed
    assert log_messages == [f"curves.png: {why}; continuing without it\n"]


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_interrupt_and_exit_pass_through(log_messages, signal):
    with pytest.raises(signal), OptionalOutput("curves.png"):
        raise signal
    assert log_messages == []


def test_steps_after_a_failure_are_skipped(log_messages):
    ran: list[int] = []

    def step(number: int) -> None:
        ran.append(number)
        if number == 2:
            raise OSError(28, "No space left on device")

    output = OptionalOutput("tensorboard")
    for number in range(5):
        output.run(lambda number=number: step(number))
    assert ran == [0, 1, 2]
    assert len(log_messages) == 1


def test_requested_output_on_a_full_disk_is_an_error(tmp_path, capsys):
    with pytest.raises(StorageError) as caught, requested_output("--out", tmp_path):
        raise OSError(28, "No space left on device")
    assert caught.value.report() == ExitCode.STORAGE
    expected = f"error: --out {tmp_path}: not written: No space left on device; free disk space, or name another file\n"
    assert capsys.readouterr().err == expected


def test_missing_package_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="ModuleNotFoundError: no matplotlib"), requested_output("--out", tmp_path):
        raise ModuleNotFoundError("no matplotlib")


def test_bug_is_not_reported_as_a_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), requested_output("--out", tmp_path):
        raise ZeroDivisionError


def test_output_is_written_through_a_symlink(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_output(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"


def test_output_to_a_device_keeps_the_device(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    write_output(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_char_device()


def test_error_is_described_in_one_line():
    assert one_line(ValueError("\n\n a\nb")) == "ValueError: a"
    assert one_line(OSError("no number")) == "OSError: no number"
