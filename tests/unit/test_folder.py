"""The run folder before and after a run has saved: status and saved config."""

from pathlib import Path

import pytest
from kit.run_folders import checkpointed, config_of

from distributed.run.folder import RunFolder


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


def test_empty_folder_has_no_status_and_no_config(path):
    assert RunFolder(path).status().as_json() == {}
    assert RunFolder(path).saved_config() is None


def test_saved_config_is_the_newest_checkpoints(path):
    checkpointed(path, config_of(path, "--seed", "1"), step=9)
    checkpointed(path, config_of(path, "--seed", "2"), step=10)
    saved = RunFolder(path).saved_config()
    assert saved is not None
    assert saved.seed == 2


@pytest.mark.parametrize(
    ("run", "name"),
    [("sweep/optim.lr=0.1/seed-0", "optim.lr=0.1/seed-0"), ("sweep/seed-0", "sweep/seed-0"), ("one", "one")],
)
def test_a_seed_of_a_sweep_is_named_with_its_trial(run, name, tmp_path):
    assert RunFolder(tmp_path / run).name == name
