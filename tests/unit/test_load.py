"""Configs from Python, as a script or notebook loads them."""

import os
from pathlib import Path

import pytest

from distributed.config import TrainConfig, from_command_line, load_config
from distributed.config.optim import AdamW
from distributed.errors import InputError


def test_load_config_without_arguments_gives_the_defaults() -> None:
    assert load_config() == from_command_line([]).config


def test_load_config_overrides_a_shipped_config() -> None:
    config = load_config("cifar10", epochs=3, optim={"lr": 0.2})
    assert config == from_command_line(["cifar10", "--epochs", "3", "--optim.lr", "0.2"]).config
    assert config.run_dir == Path("runs/cifar10")


def test_load_config_reads_a_file_by_path_or_text(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text("epochs = 3\n[optim]\nmomentum = 0.5\n")
    assert load_config(file) == load_config(str(file)) == from_command_line([str(file)]).config
    assert load_config(file, optim={"lr": 0.2}).optim == TrainConfig.model_validate(
        {"optim": {"name": "sgd", "lr": 0.2, "momentum": 0.5}}
    ).optim  # fmt: skip


def test_load_config_takes_paths_none_and_sections() -> None:
    config = load_config(
        run_dir=Path("here"), checkpoint={"upload_to": None}, optim=AdamW(beta1=0.8), data={"root": "there"}
    )
    assert (config.run_dir, config.checkpoint.upload_to, config.data.root) == (Path("here"), None, Path("there"))
    assert config.optim == AdamW(beta1=0.8)
    assert load_config(run_dir="here").run_dir == Path("here")


def test_load_reports_errors_as_the_command_line_does() -> None:
    with pytest.raises(InputError) as caught:
        load_config("cifar10", epochs=0, optim={"lrr": 1}, clip_norm=1, optimizer="sgd")
    assert caught.value.lines == (
        "load_config(): epochs = 0: should be greater than 0",
        "load_config(): optim.lrr = 1: unknown setting; did you mean optim.lr?",
        "load_config(): clip_norm = 1: unknown setting; did you mean optim.max_grad_norm?",
        "load_config(): optimizer = sgd: unknown setting; did you mean optim.name?",
    )


def test_load_config_reports_conflicts_and_missing_files() -> None:
    with pytest.raises(InputError, match=r"^optim.nesterov = true needs momentum"):
        load_config(optim={"momentum": 0.0})
    with pytest.raises(InputError, match=r"did you mean cifar10"):
        load_config("cifar1")


def test_a_config_file_whose_name_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.toml")
    file.write_text("epochs = 3\n")
    for read in (lambda: load_config(file), lambda: from_command_line([str(file)])):
        with pytest.raises(InputError, match=r"run_dir = .*should be UTF-8 text") as caught:
            read()
        assert len(caught.value.lines) == 1
    assert load_config(file, run_dir="here").epochs == 3
