from pathlib import Path

import pytest
from kit.abuse import call

from distributed.config import from_command_line, from_saved, leaves, read_saved
from distributed.config.renamed import RENAMED, upgraded
from distributed.errors import InputError

OLD_CONFIG = """\
run_dir = "runs/old"
seed = 0
epochs = 2
global_batch_size = 32
accumulation = 2
precision = "float32"
channels_last = true
device = "auto"
threads = 0
timeout_seconds = 600.0
cuda_graphs = true
compile = false

[data]
validation_fraction = 0.25
split_seed = 0
normalize = "mean_std"
placement = "auto"
name = "generated10"
train_samples = 600
test_samples = 200

[data.augment]
crop = 4
flip = true
mixup = 0.0
cutmix = 0.0
cutout = 0

[model]
name = "improved_alexnet"
initial_weights = "he"
dropout = 0.5

[loss]
label_smoothing = 0.0

[optim]
name = "sgd"
lr = 0.1
lr_scaling = "none"
decay_norm_and_bias = false
clip_norm = 1.5
momentum = 0.9
nesterov = true
weight_decay = 0.0005

[schedule]
name = "plateau"
metric = "accuracy"
factor = 0.1
patience = 20
min_delta = 0.0
cooldown = 0
max_drops = 3
return_to_best = true

[early_stopping]
metric = "accuracy"
patience = 5
min_delta = 0.0

[engine]
name = "ddp"
bucket_mib = 25

[exact]
shards = "auto"

[evaluation]
batch_size = 1000
flips = true
test_every_epoch = true

[checkpoint]
every_steps = 0
every_minutes = 5.0
max_overhead = 1.0
keep_last = 2
best_by = "auto"

[logging]
every_steps = 5
level = "INFO"
tensorboard = false
profile_steps = 0
"""
"""The config.toml of a run by an earlier version, in full."""

NOW = (
    "configs/debug.toml --logging.curves true --run_dir runs/old --grad_accum_steps 2 --optim.max_grad_norm 1.5 "
    "--model.init he --evaluation.flip_tta true --schedule.name plateau --schedule.restore_best_on_drop true "
    "--data.validation_fraction 0.25 --early_stopping.patience 5"
)

VALUES = {
    "accumulation": "2",
    "data.side": "64",
    "evaluation.flips": "true",
    "model.initial_weights": "he",
    "optim.clip_norm": "1.5",
    "schedule.return_to_best": "true",
}


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(OLD_CONFIG)
    return file


def test_every_renamed_setting_exists_under_its_new_name() -> None:
    known = {leaf.path for leaf in leaves.leaves()}
    assert VALUES.keys() == RENAMED.keys()
    for old, new in RENAMED.items():
        assert old not in known
        assert new in known


def test_an_old_config_of_a_run_is_read_with_the_new_names(old_file: Path) -> None:
    assert read_saved(old_file) == from_command_line(NOW.split()).config


def test_a_run_can_be_resumed_by_its_old_config(old_file: Path) -> None:
    (old_file.parent / "status.json").write_text("{}")
    expected = from_command_line([*NOW.replace("runs/old", str(old_file.parent)).split()]).config
    assert from_command_line([str(old_file)]).config == expected


def test_a_users_file_with_old_names_is_refused(old_file: Path) -> None:
    with pytest.raises(InputError) as caught:
        from_command_line([str(old_file)])
    assert caught.value.lines == (
        f"{old_file}:32: model.initial_weights = he: renamed to model.init",
        f"{old_file}:43: optim.clip_norm = 1.5: renamed to optim.max_grad_norm",
        f"{old_file}:56: schedule.return_to_best = true: renamed to schedule.restore_best_on_drop",
        f"{old_file}:72: evaluation.flips = true: renamed to evaluation.flip_tta",
        f"{old_file}:5: accumulation = 2: renamed to grad_accum_steps",
    )


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_on_the_command_line_ends_with_exit_code_2(old: str, tmp_path: Path) -> None:
    arguments = [f"--{old.replace('_', '-')}", VALUES[old], "--run_dir", tmp_path / "run"]
    if old.startswith("schedule."):
        arguments += ["--schedule.name", "plateau"]
    found = call("train", *arguments)
    assert found.code == 2
    assert found.errors == [f"error: command line: {old} = {VALUES[old]}: renamed to {RENAMED[old]}"]
    assert not (tmp_path / "run").exists()


def test_an_old_name_without_a_value_is_refused_too() -> None:
    with pytest.raises(InputError, match=r"^command line: --evaluation.flips: renamed to evaluation.flip_tta$"):
        from_command_line(["--evaluation.flips"])


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_without_its_section_is_understood(old: str) -> None:
    with pytest.raises(InputError, match=rf"(did you mean|renamed to) {RENAMED[old]}\??$"):
        from_command_line([f"--{old.rpartition('.')[2]}", VALUES[old]])


def test_an_old_name_beside_the_new_one_is_refused(old_file: Path) -> None:
    with pytest.raises(InputError, match=r"^command line: accumulation = 2: renamed to grad_accum_steps$"):
        from_command_line(["--accumulation", "2", "--grad_accum_steps", "2"])
    old_file.write_text("accumulation = 2\ngrad_accum_steps = 2\n")
    with pytest.raises(InputError) as caught:
        read_saved(old_file)
    assert caught.value.lines == (
        f"{old_file}: accumulation and grad_accum_steps are the same setting; remove accumulation",
    )


def test_an_old_name_is_refused_in_a_replaced_section(tmp_path: Path) -> None:
    file = tmp_path / "user.toml"
    file.write_text("[optim]\nclip_norm = 1.5\n")
    with pytest.raises(InputError, match=r"user.toml:2: optim.clip_norm = 1.5: renamed to optim.max_grad_norm$"):
        from_command_line([str(file), "--optim.name", "adamw"])


def test_an_unknown_setting_in_a_saved_config_is_an_error(old_file: Path) -> None:
    old_file.write_text("[optim]\nclip_norm = 1.5\nlookahead = 3\n")
    with pytest.raises(InputError) as caught:
        read_saved(old_file)
    assert caught.value.lines == (f"{old_file}:3: optim.lookahead = 3: unknown setting; --help lists all of them",)


def test_powersgd_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError) as caught:
        from_command_line(["--engine.compression", "powersgd", "--engine.powersgd_rank", "2"])
    assert caught.value.lines == (
        "command line: engine.compression = powersgd: PowerSGD was removed; set engine.compression = bfloat16 or remove this "
        "setting",
        "command line: engine.powersgd_rank = 2: PowerSGD was removed; remove this setting",
    )


def test_a_saved_run_without_powersgd_is_read(old_file: Path) -> None:
    config = from_saved({"engine": {"name": "ddp", "compression": "bfloat16", "powersgd_rank": None}})
    assert config.compression == "bfloat16"


def test_a_saved_run_with_powersgd_is_refused(old_file: Path) -> None:
    old_file.write_text('[engine]\ncompression = "powersgd"\npowersgd_rank = 2\n')
    reason = "engine.compression = powersgd: PowerSGD was removed; use the version that started this run"
    with pytest.raises(InputError) as caught:
        read_saved(old_file)
    assert caught.value.lines == (f"{old_file}: {reason}",)
    with pytest.raises(InputError) as caught:
        from_saved({"engine": {"name": "ddp", "compression": "powersgd", "powersgd_rank": 2}})
    assert caught.value.lines == (reason,)


def test_a_setting_that_moved_to_another_section_is_read_there() -> None:
    saved = from_saved({"data": {"name": "image_folder", "side": 64}, "model": {"name": "net:make"}})
    assert saved.model.input_side == 64
    built_in = from_saved({"data": {"name": "image_folder", "side": None}, "model": {"name": "alexnet"}})
    assert built_in.model.input_side == 224


def test_a_saved_config_under_both_names_is_refused() -> None:
    with pytest.raises(InputError, match=r"^model.initial_weights and model.init are the same setting"):
        from_saved({"model": {"init": "he", "initial_weights": "he"}})


@pytest.mark.parametrize(
    "values", [{}, {"optim": 3}, {"engine": {"compression": [1]}}, {"optim": None, "accumulation": None}, {"model": []}]
)
def test_damaged_values_are_left_to_the_checks(values: dict[str, object]) -> None:
    before = dict(values)
    upgraded(values)
    assert values == before
