import re

from kit.configs import config_of

from distributed.config import TrainConfig, changes_experiment, help_text
from distributed.config.leaves import leaves


def _paths(tree: dict, prefix: str = "") -> set[str]:
    return {
        path
        for key, value in tree.items()
        for path in (_paths(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key})
    }


def _all_paths() -> set[str]:
    variants = [["--schedule.name", name] for name in ("constant", "cosine", "linear", "one_cycle", "plateau")]
    variants += [["--data.name", "generated10"], ["--data.name", "image_folder"], ["--early_stopping.patience", "3"]]
    variants += [["--optim.name", "adamw"], ["--optim.name", "muon"], ["--model.name", "fast_alexnet"]]
    variants += [["--engine.name", "fsdp"], ["--engine.name", "deepspeed"], ["--scaling.num_workers", "3"]]
    variants += [["--logging.wandb.mode", "offline"], ["--logging.mlflow.name", "x"]]
    variants += [["--model.name", "package.module:factory"], ["--data.name", "package.module:function"]]
    variants += [["--loss.name", "package.module:function"]]
    found = {path for arguments in variants for path in _paths(config_of(*arguments).model_dump())}
    return found - {"early_stopping", "scaling", "logging.wandb", "logging.mlflow"}


WIDE = 10_000


def test_help_shows_every_setting_with_its_default():
    lines = {
        arguments[0]: line
        for line in help_text(WIDE).splitlines()
        if (arguments := line.split()) and arguments[0][:2] == "--"
    }
    assert set(lines) == {f"--{path}" for path in _all_paths()}
    assert "(default 0.1)" in lines["--optim.lr"]
    assert "(default true)" in lines["--channels_last"]
    assert "[float | none]" in lines["--optim.max_grad_norm"]


def test_help_describes_every_variant_of_a_setting():
    def shown(value: object) -> str:
        if isinstance(value, tuple):
            return str(list(value))
        return str(value).lower() if isinstance(value, bool | None) else str(value)

    blocks = {block.split()[0]: block for block in re.split(r"\n    --", help_text(WIDE))[1:]}
    for leaf in leaves():
        assert leaf.doc
        assert leaf.doc in blocks[leaf.path], leaf
        if not leaf.path.endswith(".name"):
            assert f"default {shown(leaf.default)}" in blocks[leaf.path], leaf


def test_help_wraps_to_the_width_without_losing_words():
    narrow = help_text(100).partition("settings:")[2]
    assert max(map(len, narrow.splitlines())) <= 100
    assert narrow.split() == help_text(WIDE).partition("settings:")[2].split()


def test_help_stars_settings_that_may_change_on_resume():
    starred = {
        line.split()[0][2:] for line in help_text(WIDE).splitlines() if line.lstrip().startswith("--") and " * " in line
    }
    config = TrainConfig()
    assert starred == {path for path in _all_paths() if path != "epochs" and not changes_experiment(path, config)}
