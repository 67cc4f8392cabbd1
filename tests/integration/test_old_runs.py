"""A run by a version whose settings had other names is resumed, evaluated and compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from kit.abuse import call
from kit.trained_runs import copy_of, edit_state

from distributed.config import as_toml, read_saved, renamed
from distributed.run.checkpoint_layout import checkpoints

pytestmark = pytest.mark.timeout(300)

# One that moved to another section applies to image folders only; see test_renamed.py.
RENAMED = {old: new for old, new in renamed.RENAMED.items() if old.rpartition(".")[0] == new.rpartition(".")[0]}

SETTINGS = [
    "configs/debug.toml", "--device", "cpu", "--data.train_samples", 200, "--data.test_samples", 50,
    "--data.validation_fraction", 0.25, "--schedule.name", "plateau", "--schedule.restore_best_on_drop", "true",
    "--grad_accum_steps", 2, "--optim.max_grad_norm", 1.5, "--model.init", "he", "--evaluation.flip_tta", "true",
]  # fmt: skip


def with_old_names(values: dict[str, Any]) -> dict[str, Any]:
    """The config as the earlier version saved it."""
    old: dict[str, Any] = json.loads(json.dumps(values))
    for old_path, new_path in RENAMED.items():
        *sections, new_key = new_path.split(".")
        section = old
        for name in sections:
            section = section[name]
        section[old_path.rpartition(".")[2]] = section.pop(new_key)
    return old


def made_old(run: Path) -> Path:
    """Rewrite the config in a run's config.toml and in each of its checkpoints under the old names."""
    config = read_saved(run / "config.toml")
    text = as_toml(config)
    for old_path, new_path in RENAMED.items():
        new_key, old_key = new_path.rpartition(".")[2], old_path.rpartition(".")[2]
        assert text.count(f"\n{new_key} = ") == 1
        text = text.replace(f"\n{new_key} = ", f"\n{old_key} = ")
    (run / "config.toml").write_text(text)
    for checkpoint in checkpoints(run / "checkpoints"):
        edit_state(checkpoint, config=with_old_names(config.model_dump(mode="json")))
    return run


def test_an_old_run_is_evaluated_compared_and_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", *SETTINGS, "--epochs", 1, "--run_dir", run).code == 0
    old = made_old(copy_of(run, tmp_path / "old"))

    evaluated = [call("evaluate", folder, "--json", "--confusion", tmp_path / "c.png") for folder in (run, old)]
    assert [found.code for found in evaluated] == [0, 0], evaluated[1].err
    assert evaluated[0].out.replace(str(run), str(old)) == evaluated[1].out
    compared = call("compare", run, old)
    assert compared.code == 0, compared.err

    for folder in (run, old):
        resumed = call("train", *SETTINGS, "--epochs", 2, "--run_dir", folder)
        assert resumed.code == 0, resumed.err
        assert json.loads((folder / "status.json").read_text())["epoch"] == 2
    compared = call("compare", run, old)
    assert compared.code == 0, compared.err
    assert "clip_norm" not in (old / "config.toml").read_text()

    changed = [2.5 if value == 1.5 else value for value in SETTINGS]
    refused = call("train", *changed, "--epochs", 3, "--run_dir", made_old(old))
    assert refused.code == 2
    assert f"error: {old}: optim.max_grad_norm = 2.5: this run was started with 1.5" in refused.errors
