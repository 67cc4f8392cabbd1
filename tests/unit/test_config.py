import json
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from kit.configs import config_of, mistakes
from pydantic import ValidationError

from distributed.config import (
    TrainConfig,
    as_toml,
    differences,
    from_command_line,
)
from distributed.data.sources.registry import class_names


def test_no_arguments_give_the_defaults():
    command = from_command_line([])
    config = command.config
    assert config == TrainConfig(run_dir=Path("runs/improved_alexnet-cifar10"))
    assert not command.names_data
    assert (config.data.name, config.schedule.name, config.engine.name) == ("cifar10", "one_cycle", "ddp")
    assert (config.global_batch_size, config.grad_accum_steps, config.optim.lr) == (128, 1, 0.1)


def test_the_default_data_set_can_be_changed():
    command = from_command_line([], default_data="generated10")
    assert command.config.data.name == "generated10"
    assert command.config.run_dir == Path("runs/improved_alexnet-generated10")
    assert not command.names_data


@pytest.mark.parametrize("arguments", [["--data.name", "cifar100"], ["--data.root", "elsewhere"]])
def test_data_on_the_command_line_counts_as_named(arguments):
    assert from_command_line(arguments).names_data


def test_a_config_file_names_the_data_and_the_run_dir(write):
    command = from_command_line([str(write("epochs = 3\n", "short.toml"))])
    assert command.names_data
    assert command.config.run_dir == Path("runs/short")
    assert command.config.epochs == 3


def test_the_tree_is_frozen():
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.optim.lr = 3  # type: ignore[misc]


def test_the_data_set_determines_the_number_of_classes():
    names = ("cifar10", "cifar100", "generated10", "generated100")
    assert [len(class_names(config_of("--data.name", name).data)) for name in names] == [10, 100, 10, 100]


@pytest.mark.parametrize(
    "arguments", [["--optim.lr", "0.05"], ["--optim.lr=0.05"], ["--optim.lr=5e-2"], ["--optim.lr", ".05"]]
)
def test_numbers_are_accepted_in_every_usual_form(arguments):
    assert config_of(*arguments).optim.lr == 0.05


@pytest.mark.parametrize("text", ["0.1 # half", "0.1 # half\n", "0.1\nfoo = 2", "0.1\n[loss]"])
def test_no_part_of_a_value_is_dropped(text):
    assert len(mistakes("--optim.lr", text)) == 1


def test_an_integer_is_accepted_for_a_float():
    assert config_of("--optim.lr", "1").optim.lr == 1.0


@pytest.mark.parametrize("arguments", [["--optim.decay_norm_and_bias"], ["--optim.decay-norm-and-bias"]])
def test_a_bare_flag_is_true_and_dashes_are_underscores(arguments):
    assert config_of(*arguments).optim.decay_norm_and_bias is True
    assert config_of(*arguments, "--epochs", "3").epochs == 3


def test_a_flag_can_be_switched_off():
    assert config_of("--channels_last", "false", "--optim.nesterov=false").channels_last is False


def test_none_means_no_value():
    assert config_of("--schedule.name", "plateau", "--schedule.max_drops", "none").schedule.max_drops is None
    assert config_of("--early_stopping", "none").early_stopping is None
    assert config_of("--optim.max_grad_norm", "None").optim.max_grad_norm is None


def test_a_negative_number_is_a_value_not_an_option():
    assert mistakes("--seed", "-1") == ("command line: seed = -1: should be greater than or equal to 0",)


@pytest.mark.parametrize("text", ["123", "true", "none", "2024-01-01", "[1]"])
def test_a_run_dir_is_always_text(text):
    assert config_of("--run_dir", text).run_dir == Path(text)


def test_a_section_appears_with_its_first_setting():
    assert config_of("--early_stopping.patience", "5").early_stopping.patience == 5


def test_the_command_line_overrides_the_file(write):
    file = write("epochs = 3\nseed = 4\n")
    config = config_of(file, "--epochs", "5")
    assert (config.epochs, config.seed) == (5, 4)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--epochs", "3", "stray"], "command line: 'stray': not an option; write settings as --name value"),
        (["--epochs"], "command line: --epochs: a value is missing; write --epochs VALUE"),
        (["--epochs", "--seed", "1"], "command line: --epochs: a value is missing; write --epochs VALUE"),
        (["--epochs", "3", "--epochs=4"], "command line: --epochs: given twice; remove one"),
        (["--optim", "3"], "command line: optim = 3: is a section; set its fields, e.g. --optim.name VALUE"),
        (["--schedule", "5"], "command line: schedule = 5: is a section; set its fields, e.g. --schedule.name VALUE"),
    ],
)
def test_arguments_that_are_not_settings_are_explained(arguments, line):
    assert mistakes(*arguments) == (line,)


def test_all_wrong_arguments_are_reported_together():
    assert len(mistakes("--epochs", "3", "stray", "--epochs", "4", "--seed")) == 3


def test_changing_the_variant_keeps_only_shared_settings(write):
    write('[schedule]\nname = "cosine"\nwarmup_epochs = 2.0\nfinal_factor = 0.5\n', "base.toml")
    config = config_of(write('extends = "base.toml"\n[schedule]\nname = "constant"\n'))
    assert config.schedule.model_dump() == {"name": "constant", "warmup_epochs": 2.0}


def test_an_unnamed_variant_can_be_changed(write):
    write("[schedule]\nwarmup_fraction = 0.5\n", "base.toml")
    config = config_of(write('extends = "base.toml"\n'), "--schedule.name", "plateau", "--schedule.patience", "7")
    assert (config.schedule.name, config.schedule.patience) == ("plateau", 7)


def test_the_data_set_can_be_changed_on_the_command_line(write):
    file = write(
        '[data]\nname = "generated10"\ntrain_samples = 100\nvalidation_fraction = 0.1\n[data.augment]\ncrop = 2\n'
    )
    data = config_of(file, "--data.name", "cifar100").data
    assert (data.name, data.validation_fraction, data.augment.crop) == ("cifar100", 0.1, 2)
    assert config_of(file, "--data.name", "generated100").data.train_samples == 100


def test_a_setting_of_the_default_variant_needs_no_name():
    assert config_of("--schedule.start_factor", "0").schedule.start_factor == 0


@pytest.mark.parametrize("order", [1, -1])
def test_a_setting_of_another_variant_is_refused(order):
    pairs = [("--schedule.name", "plateau"), ("--schedule.start_factor", "0")][::order]
    assert mistakes(*[word for pair in pairs for word in pair]) == (
        "command line: schedule.start_factor = 0: belongs to schedule.name = one_cycle, but here it is plateau; "
        "remove one of them",
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_options_does_not_matter(order):
    pairs = [("--schedule.name", "plateau"), ("--schedule.patience", "4")][::order]
    assert config_of(*[word for pair in pairs for word in pair]).schedule.patience == 4


def test_another_variants_setting_is_reported_with_its_line(write):
    file = write('[schedule]\nname = "constant"\npatience = 3\n')
    (line,) = mistakes(file)
    assert line.startswith(
        f"{file}:3: schedule.patience = 3: belongs to schedule.name = plateau, but here it is constant"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--data.name", "generated100", "--data.train_samples", "20", "--run_dir", "a b"],
        ["--schedule.name", "plateau", "--early_stopping.patience", "3", "--optim.max_grad_norm", "1"],
        ["--schedule.name", "plateau", "--schedule.max_drops", "none"],
        ["--schedule.name", "cosine", "--schedule.warmup_epochs", "1"],
        ["--schedule.name", "constant", "--optim.lr_scaling", "linear", "--optim.lr_base_batch", "64"],
        ["--seed", str(2**63 - 1), "--optim.lr", "1e-05"],
        ["--exact.shards", "4"],
        ["--exact.shards", "0"],
        ["--exact.shards", "auto"],
    ],
)
def test_the_resolved_config_reads_back_equal(arguments, write):
    config = config_of(*arguments)
    file = write(as_toml(config), "config.toml")
    assert config_of(file) == config
    write('extends = "config.toml"\n', "more.toml")
    assert config_of(file.with_name("more.toml")) == config


def test_a_moved_runs_config_names_the_folder_it_is_in(tmp_path, write, monkeypatch):
    file = write(as_toml(config_of("--run_dir", "runs/a")), "config.toml")
    assert config_of(file).run_dir == Path("runs/a"), "not saved by a run"
    (tmp_path / "status.json").write_text("{}")
    assert config_of(file).run_dir == tmp_path
    assert config_of(file, "--run_dir", "runs/b").run_dir == Path("runs/b")
    monkeypatch.chdir(tmp_path.parent)
    write(as_toml(config_of("--run_dir", tmp_path.name)), "config.toml")
    assert config_of(file).run_dir == Path(tmp_path.name), "the same folder"


def test_differences_are_listed_by_path():
    old = config_of("--schedule.name", "constant")
    new = config_of("--schedule.name", "cosine", "--optim.lr", "0.2", "--run_dir", "elsewhere")
    assert differences(old, old) == []
    assert set(differences(old, new)) == {
        ("run_dir", "runs/improved_alexnet-cifar10", "elsewhere"),
        ("optim.lr", 0.1, 0.2),
        ("schedule.name", "constant", "cosine"),
        ("schedule.final_factor", None, 0.0),
    }


def test_auto_precision_does_not_differ_from_another():
    auto, bfloat16, float32 = (config_of("--precision", text) for text in ("auto", "bfloat16", "float32"))
    assert differences(bfloat16, auto) == differences(auto, float32) == []
    assert differences(bfloat16, float32) == [("precision", "bfloat16", "float32")]


def test_auto_shards_do_not_differ_from_a_number():
    auto, four, eight = (config_of("--exact.shards", text) for text in ("auto", "4", "8"))
    assert differences(auto, eight) == differences(eight, auto) == []
    assert differences(four, eight) == [("exact.shards", 4, 8)]


URLS = ("https://one/cifar-10-binary.tar.gz", "http://two/cifar-10-binary.tar.gz")


def test_addresses_are_a_list_on_the_command_line_and_in_files(write):
    text = json.dumps(URLS)
    file = write(f'[data]\nname = "cifar10"\ndownload = true\nurls = {text}\n')
    for arguments in (["--data.download", "--data.urls", text], [file]):
        config = config_of(*arguments)
        assert config.data.urls == URLS
        assert config_of(write(as_toml(config))).data.urls == URLS
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config_of(file, "--data.urls", "[]").data.urls == ()


@pytest.mark.parametrize("text", ["http://one/x", '["ftp://one/x"]', "[1]", '["file:///x"]', "none", "true"])
def test_anything_but_a_list_of_addresses_is_refused(text):
    (line,) = mistakes("--data.download", "--data.urls", text)
    assert line.startswith("command line: data.urls = ")
    assert "should be a list of http or https addresses, e.g. [" in line


def test_addresses_without_download_are_refused():
    (line,) = mistakes("--data.urls", '["http://one/x"]')
    assert line == "data.urls has no effect without data.download: set data.download = true or remove data.urls"


@pytest.mark.parametrize("name", ["generated10", "image_folder"])
def test_only_cifar_is_downloaded(name):
    (line,) = mistakes("--data.name", name, "--data.download")
    assert "belongs to data.name = cifar10 | cifar100" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--data.augment.crop", "0", "--data.augment.crop_padding", "reflect"],
            "data.augment.crop_padding = reflect has no effect with data.augment.crop = 0",
        ),
        (
            ["--data.validation_fraction", "0", "--data.split_seed", "7"],
            "data.split_seed = 7 has no effect with data.validation_fraction = 0",
        ),
        (
            ["--data.augment.low_res_side", "24"],
            "data.augment.low_res_side = 24 has no effect with data.augment.low_res_epochs = 0",
        ),
        (
            ["--optim.weight_decay", "0", "--optim.decay_norm_and_bias"],
            "optim.decay_norm_and_bias has no effect with optim.weight_decay = 0",
        ),
    ],
)
def test_a_setting_that_another_makes_void_is_an_error(arguments, line):
    assert mistakes(*arguments)[0].startswith(line)


LOW_RES = ("--data.augment.low_res_epochs", "2", "--data.augment.low_res_side", "24", "--model.name", "fast_alexnet")


def test_epochs_in_low_resolution_need_a_size():
    assert mistakes(*LOW_RES[:2])[0].startswith("data.augment.low_res_epochs = 2 needs data.augment.low_res_side")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--epochs", "2"], "data.augment.low_res_epochs = 2 must be less than epochs = 2"),
        (
            ["--data.augment.low_res_side", "12"],
            "data.augment.low_res_side = 12 is not possible with model.name = fast_",
        ),
    ],
)
def test_low_resolution_must_fit_the_network_and_the_epochs(arguments, line):
    kept = [value for value in zip(LOW_RES[::2], LOW_RES[1::2], strict=True) if value[0] not in arguments]
    (found,) = mistakes(*[word for pair in kept for word in pair], *arguments)
    assert found.startswith(line)


@pytest.mark.parametrize("arguments", [["--data.download"], ["--data.download", "--data.urls", '["http://one/x"]']])
def test_download_counts_as_naming_the_data(arguments):
    assert from_command_line(arguments).names_data


def test_the_cache_folder_is_a_path_or_none():
    for text, expected in (("/somewhere", Path("/somewhere")), ("none", None)):
        assert config_of("--data.name", "image_folder", "--data.cache", text).data.cache == expected


OPTIONAL = {
    "init_from": "weights", "data.augment.function": "net:erase", "checkpoint.upload_to": "s3://a/b",
    "logging.wandb.entity": "team", "logging.mlflow.tracking_uri": "sqlite:///x", "engine.compression": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("path", OPTIONAL)
def test_none_removes_the_value_of_a_file(path, write):
    project = 'logging.wandb.project = "p"\n' if "wandb" in path else ""
    base = write(f'{project}{path} = "{OPTIONAL[path]}"\n', "base.toml")
    assert attrgetter(path)(config_of(str(base))) is not None
    assert attrgetter(path)(config_of(str(base), f"--{path}", "none")) is None
    assert attrgetter(path)(config_of(str(write(f'extends = "base.toml"\n{path} = "none"\n')))) is None


def test_the_config_and_the_command_do_not_import_torch():
    code = (
        "import sys, distributed.config, distributed.train, distributed.run.folder; "
        "print(*{'torch', 'ray', 'deepspeed', 'matplotlib', 'tensorboard', 'torchvision'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("uri", ["databricks", "databricks-uc", "databricks://profile"])
def test_a_workspace_of_databricks_is_a_tracking_server(uri):
    assert config_of("--logging.mlflow.tracking_uri", uri).logging.mlflow.tracking_uri == uri
