from pathlib import Path

import pytest
from kit.configs import config_of, mistakes


def test_a_file_extends_another_relative_to_itself(tmp_path, write):
    (tmp_path / "base").mkdir()
    write("epochs = 3\nseed = 1\n[optim]\nlr = 0.5\nmomentum = 0.8\n", "base/one.toml")
    write('extends = "one.toml"\nseed = 2\n', "base/two.toml")
    config = config_of(write('extends = "base/two.toml"\n[optim]\nlr = 0.25\n'))
    assert (config.epochs, config.seed, config.optim.lr, config.optim.momentum) == (3, 2, 0.25, 0.8)


def test_files_that_extend_each_other_are_refused(write):
    first = write('extends = "b.toml"\n', "a.toml")
    write('extends = "a.toml"\n', "b.toml")
    assert mistakes(first) == (f"{first}: extends leads back to this file; remove one `extends`",)


def test_a_file_that_extends_itself_is_refused(write):
    file = write('extends = "run.toml"\n')
    assert "leads back to this file" in mistakes(file)[0]


def test_extends_must_be_text(write):
    assert "must be the name of one file" in mistakes(write("extends = 3\n"))[0]


def test_a_missing_file_is_explained(tmp_path):
    (line,) = mistakes(tmp_path / "none.toml")
    assert line == f"config file {tmp_path}/none.toml: No such file or directory; the first argument names a TOML file"


def test_a_missing_base_is_named(tmp_path, write):
    (line,) = mistakes(write('extends = "base.toml"\n'))
    assert str(tmp_path / "base.toml") in line


def test_invalid_toml_is_reported_with_its_line(write):
    file = write("epochs = 3\nseed = = 1\n")
    (line,) = mistakes(file)
    assert line.startswith(f"{file}: not valid TOML")
    assert "line 2" in line


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in mistakes(tmp_path / "run.toml")[0]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfepochs = 3\r\n\r\n[optim]\r\nlr = 0.5\r\n")
    config = config_of(tmp_path / "run.toml")
    assert (config.epochs, config.optim.lr) == (3, 0.5)


def test_lines_are_counted_as_in_editors(tmp_path):
    (tmp_path / "run.toml").write_text('run_dir = "a\u2028b\x85c"\nepochs = 0\n')
    assert mistakes(tmp_path / "run.toml")[-1].startswith(f"{tmp_path}/run.toml:2: epochs")


@pytest.mark.parametrize("setting", ["run_dir", "data.root", "init_from", "scaling.storage_path"])
def test_a_tilde_is_the_home_folder(setting, write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, _, name = setting.rpartition(".")
    file = write(f"[{section}]\n" * bool(section) + f'{name} = "~/x"\n')
    for arguments in ([f"--{setting}", "~/x"], [file]):
        value = config_of(*arguments)
        for part in setting.split("."):
            value = getattr(value, part)
        assert value == Path("/home/me/x")


def test_a_config_and_its_base_are_found_in_the_home_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("epochs = 3\n", "base.toml")
    write('extends = "~/base.toml"\n', "run.toml")
    assert config_of("~/run.toml").epochs == 3
