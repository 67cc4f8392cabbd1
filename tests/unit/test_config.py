import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from distributed.config import (
    TrainConfig,
    as_toml,
    changes_experiment,
    differences,
    from_command_line,
    help_text,
    hints,
    toml_value,
)
from distributed.config.leaves import leaves
from distributed.data.sources.registry import class_names
from distributed.errors import InputError


def config_of(*words: str | Path) -> TrainConfig:
    return from_command_line([str(word) for word in words]).config


def mistakes(*words: str | Path) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        config_of(*words)
    return caught.value.lines


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# Defaults


def test_no_arguments_give_the_defaults_of_the_tree_and_a_run_dir_named_after_model_and_data():
    command = from_command_line([])
    config = command.config
    assert config == TrainConfig(run_dir=Path("runs/improved_alexnet-cifar10"))
    assert not command.names_data
    assert (config.data.name, config.schedule.name, config.engine.name) == ("cifar10", "one_cycle", "ddp")
    assert (config.global_batch_size, config.grad_accum_steps, config.optim.lr) == (128, 1, 0.1)


def test_the_default_data_set_can_be_another():
    command = from_command_line([], default_data="generated10")
    assert command.config.data.name == "generated10"
    assert command.config.run_dir == Path("runs/improved_alexnet-generated10")
    assert not command.names_data


@pytest.mark.parametrize("words", [["--data.name", "cifar100"], ["--data.root", "elsewhere"]])
def test_data_on_the_command_line_counts_as_named(words):
    assert from_command_line(words).names_data


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


def test_the_number_of_classes_follows_from_the_data_set():
    names = ("cifar10", "cifar100", "generated10", "generated100")
    assert [len(class_names(config_of("--data.name", name).data)) for name in names] == [10, 100, 10, 100]


# Files


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


def test_a_missing_file_says_what_the_first_argument_is(tmp_path):
    (line,) = mistakes(tmp_path / "none.toml")
    assert line == f"config file {tmp_path}/none.toml: No such file or directory; the first argument names a TOML file"


def test_a_missing_base_is_named(tmp_path, write):
    (line,) = mistakes(write('extends = "base.toml"\n'))
    assert str(tmp_path / "base.toml") in line


def test_a_file_that_is_no_toml_says_where(write):
    file = write("epochs = 3\nseed = = 1\n")
    (line,) = mistakes(file)
    assert line.startswith(f"{file}: not valid TOML")
    assert "line 2" in line


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in mistakes(tmp_path / "run.toml")[0]


def test_a_byte_order_mark_and_ends_of_windows_are_read(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfepochs = 3\r\n\r\n[optim]\r\nlr = 0.5\r\n")
    config = config_of(tmp_path / "run.toml")
    assert (config.epochs, config.optim.lr) == (3, 0.5)


def test_a_line_is_counted_as_editors_do(tmp_path):
    (tmp_path / "run.toml").write_text('run_dir = "a\u2028b\x85c"\nepochs = 0\n')
    assert mistakes(tmp_path / "run.toml")[-1].startswith(f"{tmp_path}/run.toml:2: epochs")


@pytest.mark.parametrize("setting", ["run_dir", "data.root", "init_from", "scaling.storage_path"])
def test_a_tilde_is_the_home_folder(setting, write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, _, name = setting.rpartition(".")
    file = write(f"[{section}]\n" * bool(section) + f'{name} = "~/x"\n')
    for words in ([f"--{setting}", "~/x"], [file]):
        value = config_of(*words)
        for part in setting.split("."):
            value = getattr(value, part)
        assert value == Path("/home/me/x")


def test_a_config_and_its_base_are_found_in_the_home_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("epochs = 3\n", "base.toml")
    write('extends = "~/base.toml"\n', "run.toml")
    assert config_of("~/run.toml").epochs == 3


# Command line


@pytest.mark.parametrize(
    "words", [["--optim.lr", "0.05"], ["--optim.lr=0.05"], ["--optim.lr=5e-2"], ["--optim.lr", ".05"]]
)
def test_a_number_can_be_given_in_every_usual_form(words):
    assert config_of(*words).optim.lr == 0.05


def test_a_whole_number_will_do_for_a_fraction():
    assert config_of("--optim.lr", "1").optim.lr == 1.0


@pytest.mark.parametrize("words", [["--optim.decay_norm_and_bias"], ["--optim.decay-norm-and-bias"]])
def test_a_bare_flag_is_true_and_dashes_count_as_underscores(words):
    assert config_of(*words).optim.decay_norm_and_bias is True
    assert config_of(*words, "--epochs", "3").epochs == 3


def test_a_flag_can_be_switched_off():
    assert config_of("--channels_last", "false", "--optim.nesterov=false").channels_last is False


def test_none_is_no_value():
    assert config_of("--schedule.name", "plateau", "--schedule.max_drops", "none").schedule.max_drops is None
    assert config_of("--early_stopping", "none").early_stopping is None
    assert config_of("--optim.max_grad_norm", "None").optim.max_grad_norm is None


def test_a_negative_number_is_a_value_and_no_option():
    assert mistakes("--seed", "-1") == ("command line: seed = -1: should be greater than or equal to 0",)


@pytest.mark.parametrize("text", ["123", "true", "none", "2024-01-01", "[1]"])
def test_a_run_dir_is_taken_as_it_stands(text):
    assert config_of("--run_dir", text).run_dir == Path(text)


def test_a_section_appears_with_its_first_setting():
    assert config_of("--early_stopping.patience", "5").early_stopping.patience == 5


def test_the_command_line_wins_over_the_file(write):
    file = write("epochs = 3\nseed = 4\n")
    config = config_of(file, "--epochs", "5")
    assert (config.epochs, config.seed) == (5, 4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--epochs", "3", "stray"], "command line: 'stray': not an option; settings are given as --name value"),
        (["--epochs"], "command line: --epochs: a value is missing; write --epochs VALUE"),
        (["--epochs", "--seed", "1"], "command line: --epochs: a value is missing; write --epochs VALUE"),
        (["--epochs", "3", "--epochs=4"], "command line: --epochs: given twice; remove one"),
        (["--optim", "3"], "command line: optim = 3: is a section; set its fields, e.g. --optim.name VALUE"),
        (["--schedule", "5"], "command line: schedule = 5: is a section; set its fields, e.g. --schedule.name VALUE"),
    ],
)
def test_words_that_make_no_setting_are_explained(words, line):
    assert mistakes(*words) == (line,)


def test_all_wrong_words_are_told_at_once():
    assert len(mistakes("--epochs", "3", "stray", "--epochs", "4", "--seed")) == 3


# Messages


def test_a_wrong_value_names_file_line_key_value_and_what_it_should_be(write):
    file = write("seed = 1\n\n[optim]\nlr = -0.5\n")
    assert mistakes(file) == (f"{file}:4: optim.lr = -0.5: should be greater than 0",)


def test_a_wrong_value_of_a_base_names_the_base(write):
    base = write("# a comment\nepochs = 0\n", "base.toml")
    assert mistakes(write('extends = "base.toml"\n')) == (f"{base}:2: epochs = 0: should be greater than 0",)


def test_a_value_mended_on_the_command_line_is_no_mistake(write):
    assert config_of(write("epochs = 0\n"), "--epochs", "1").epochs == 1


def test_the_place_is_where_the_value_was_set_last(write):
    assert mistakes(write("epochs = 1\n"), "--epochs", "0") == ("command line: epochs = 0: should be greater than 0",)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--epochs", "true"], "epochs = true: should be a valid integer"),
        (["--epochs", "1.5"], "epochs = 1.5: should be a valid integer"),
        (["--optim.lr", "inf"], "optim.lr = inf: should be a finite number"),
        (["--optim.lr", "fast"], "optim.lr = fast: should be a valid number"),
        (["--precision", "half"], "precision = half: should be 'float32', 'tf32', 'bfloat16', 'float16' or 'float64'"),
        (
            ["--schedule.name", "platoe"],
            "schedule.name = platoe: should be one of constant | cosine | one_cycle | plateau",
        ),
        (
            ["--data.name", "mnist"],
            "data.name = mnist: should be one of cifar10 | cifar100 | generated10 | generated100 | image_folder",
        ),
        (["--data.augment.crop", "-1"], "data.augment.crop = -1: should be greater than or equal to 0"),
        (["--early_stopping.patience", "0"], "early_stopping.patience = 0: should be greater than 0"),
        *[
            (
                ["--exact.shards", text],
                f"exact.shards = {text}: should be a power of two, as 8, or 0 for fast mode, or auto",
            )
            for text in ("3", "12", "-1", "true", "false", "8.0", "none", "atuo")
        ],
    ],
)
def test_a_wrong_value_says_what_it_should_be(words, complaint):
    assert mistakes(*words) == (f"command line: {complaint}",)


def test_all_errors_come_at_once_a_line_each(write):
    file = write("epochs = 0\n[optim]\nlr = 0\nspeed = 3\n[schedule]\npeak = 1\n")
    lines = mistakes(file, "--seed", "x")
    assert [line.split(": ")[0] for line in lines] == ["command line"] + [f"{file}:{n}" for n in (1, 3, 4, 6)]
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("epoch", "epochs"),
        ("lr", "optim.lr"),
        ("crop", "data.augment.crop"),
        ("augment.crop", "data.augment.crop"),
        ("optim.momentm", "optim.momentum"),
        ("optim.momentun", "optim.momentum"),
        ("optimm.lr", "optim.lr"),
        ("schedule.patiense", "schedule.patience"),
        ("evaluatoin.batch_size", "evaluation.batch_size"),
        ("model.epochs", "epochs"),
        ("loging.every_steps", "logging.every_steps"),
        ("checkpont.every_steps", "checkpoint.every_steps"),
    ],
)
def test_a_misspelt_setting_is_guessed_in_its_right_section(option, meant):
    assert mistakes(f"--{option}", "3") == (f"command line: {option} = 3: unknown setting; did you mean {meant}?",)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("batch_size", "global_batch_size"),
        ("batch-size", "global_batch_size"),
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("wd", "optim.weight_decay"),
        ("amp", "precision"),
        ("dataset", "data.name"),
        ("data_dir", "data.root"),
        ("output_dir", "run_dir"),
        ("num_workers", "threads"),
        ("num_epochs", "epochs"),
        ("grad_clip", "optim.max_grad_norm"),
        ("optimizer", "optim.name"),
        ("LR", "optim.lr"),
    ],
)
def test_names_of_other_tools_are_known(option, meant):
    (line,) = mistakes(f"--{option}", "3")
    assert f"unknown setting; did you mean {meant}?" in line


def test_every_hint_names_a_setting():
    assert hints._OTHER_NAMES.keys() <= hints.known()
    assert not hints._MEANT.keys() & (hints.known() | hints._ADVICE.keys())


@pytest.mark.parametrize("option", ["gpus", "nproc_per_node", "world_size"])
def test_who_asks_for_processes_is_sent_to_the_launcher(option):
    assert "torchrun --nproc_per_node=N" in mistakes(f"--{option}", "3")[0]


@pytest.mark.parametrize(
    ("words", "others"),
    [
        (["--optim.name", "lion", "--optim.lr", "-1"], ["optim.lr = -1"]),
        (["--optim.name", "lion", "--optim.beta1", "2"], ["optim.beta1 = 2"]),
        (["--optim.name", "lion", "--optim.momentum", "0.8"], []),
        (["--optim.name", "lion", "--optim.beta1", "0.5", "--optim.momentum", "0.8"], []),
        (["--optim.name", "lion", "--optim.lrr", "1"], ["optim.lrr = 1: unknown setting"]),
        (["--optim.name", "lion", "--epochs", "0", "--schedule.name", "x", "--schedule.patience", "-1"],
         ["schedule.name = x", "epochs = 0", "schedule.patience = -1"]),
        (["--data.name", "mnist", "--data.augment.crop", "99"], ["data.augment.crop = 99"]),
        (["--seed", "1", "stray", "--optim.lr", "-1"], ["optim.lr = -1"]),
        (["--epochs", "--optim.lr", "-1"], ["optim.lr = -1"]),
    ],
)  # fmt: skip
def test_one_mistake_hides_no_other(words, others):
    lines = mistakes(*words)[1:]
    assert len(lines) == len(others)
    assert all(other in line for other, line in zip(others, lines, strict=True))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (0.1, "0.1"),
        (1e-5, "1e-05"),
        ("x", '"x"'),
        (None, '"none"'),
        (["a", "b"], '["a", "b"]'),
        ((), "[]"),
    ],
)
def test_a_value_is_spelt_as_in_a_file(value, text):
    assert toml_value(value) == text


def test_a_setting_like_no_other_points_to_help():
    assert mistakes("--xyzzy", "3") == ("command line: xyzzy = 3: unknown setting; --help lists all of them",)


def test_a_misspelt_section_of_a_file_is_named_with_its_line(write):
    file = write("epochs = 3\n[optimm]\nlr = 0.1\n")
    (line,) = mistakes(file)
    assert "did you mean optim.lr?" in line
    assert line.startswith((f"{file}:2: ", f"{file}:3: "))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--grad_accum_steps", "9", "--global_batch_size", "8"],
            ["grad_accum_steps = 9", "global_batch_size = 8", "lower"],
        ),
        (["--optim.momentum", "0"], ["optim.nesterov = true needs momentum", "optim.nesterov = false"]),
        (
            ["--exact.shards", "16", "--global_batch_size", "8"],
            ["exact.shards = 16 is more than the 8 images of a micro-batch", "lower it", "raise global_batch_size"],
        ),
        (
            ["--exact.shards", "8", "--global_batch_size", "20", "--grad_accum_steps", "3"],
            ["exact.shards = 8 is more than the 6 images of a micro-batch"],
        ),
        (["--optim.lr_base_batch", "128"], ["optim.lr_base_batch = 128 has no effect", "optim.lr_scaling"]),
        (["--optim.lr_scaling", "sqrt"], ["optim.lr_scaling = sqrt needs optim.lr_base_batch"]),
        (
            ["--schedule.name", "cosine", "--schedule.warmup_epochs", "3", "--epochs", "3"],
            ["schedule.warmup_epochs = 3.0", "epochs = 3"],
        ),
    ],
)
def test_settings_that_cannot_stand_together_are_explained(words, parts):
    (line,) = mistakes(*words)
    assert [part for part in parts if part not in line] == []


def test_without_validation_all_that_watches_it_is_refused_at_once():
    lines = mistakes(
        "--data.validation_fraction", "0", "--schedule.name", "plateau", "--early_stopping.patience", "3",
        "--checkpoint.best_by", "loss",
    )  # fmt: skip
    assert len(lines) == 3
    assert all("data.validation_fraction above 0" in line for line in lines)


def test_conflicts_wait_until_each_field_is_valid():
    assert mistakes("--optim.momentum", "0", "--epochs", "0") == ("command line: epochs = 0: should be greater than 0",)


# Variants of a section


def test_a_section_that_changes_its_name_keeps_only_what_both_variants_have(write):
    write('[schedule]\nname = "cosine"\nwarmup_epochs = 2.0\nfinal_factor = 0.5\n', "base.toml")
    config = config_of(write('extends = "base.toml"\n[schedule]\nname = "constant"\n'))
    assert config.schedule.model_dump() == {"name": "constant", "warmup_epochs": 2.0}


def test_a_variant_can_be_changed_where_the_base_did_not_name_its_own(write):
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
def test_a_setting_of_another_variant_is_refused_in_any_order(order):
    pairs = [("--schedule.name", "plateau"), ("--schedule.start_factor", "0")][::order]
    assert mistakes(*[word for pair in pairs for word in pair]) == (
        "command line: schedule.start_factor = 0: belongs to schedule.name = one_cycle, and here it is plateau; "
        "remove one of them",
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_options_does_not_matter(order):
    pairs = [("--schedule.name", "plateau"), ("--schedule.patience", "4")][::order]
    assert config_of(*[word for pair in pairs for word in pair]).schedule.patience == 4


def test_a_setting_of_another_variant_in_a_file_is_refused_with_its_line(write):
    file = write('[schedule]\nname = "constant"\npatience = 3\n')
    (line,) = mistakes(file)
    assert line.startswith(
        f"{file}:3: schedule.patience = 3: belongs to schedule.name = plateau, and here it is constant"
    )


# There and back


@pytest.mark.parametrize(
    "words",
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
def test_the_resolved_config_reads_back_to_an_equal_one(words, write):
    config = config_of(*words)
    file = write(as_toml(config), "config.toml")
    assert config_of(file) == config
    write('extends = "config.toml"\n', "more.toml")
    assert config_of(file.with_name("more.toml")) == config


def test_differences_are_told_by_path():
    old = config_of("--schedule.name", "constant")
    new = config_of("--schedule.name", "cosine", "--optim.lr", "0.2", "--run_dir", "elsewhere")
    assert differences(old, old) == []
    assert set(differences(old, new)) == {
        ("run_dir", "runs/improved_alexnet-cifar10", "elsewhere"),
        ("optim.lr", 0.1, 0.2),
        ("schedule.name", "constant", "cosine"),
        ("schedule.final_factor", None, 0.0),
    }


def test_auto_shards_are_no_difference_to_a_number_of_them_since_they_may_stand_for_it():
    auto, four, eight = (config_of("--exact.shards", text) for text in ("auto", "4", "8"))
    assert differences(auto, eight) == differences(eight, auto) == []
    assert differences(four, eight) == [("exact.shards", 4, 8)]


def _paths(tree: dict, prefix: str = "") -> set[str]:
    return {
        path
        for key, value in tree.items()
        for path in (_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def _all_paths() -> set[str]:
    variants = [["--schedule.name", name] for name in ("constant", "cosine", "one_cycle", "plateau")]
    variants += [["--data.name", "generated10"], ["--data.name", "image_folder"], ["--early_stopping.patience", "3"]]
    variants += [["--optim.name", "adamw"]]
    variants += [["--engine.name", "fsdp"], ["--engine.name", "deepspeed"], ["--scaling.num_workers", "3"]]
    found = {path for words in variants for path in _paths(config_of(*words).model_dump())}
    return found - {"early_stopping", "scaling"}


WIDE = 10_000


def test_help_shows_every_setting_with_its_default():
    lines = {
        words[0]: line for line in help_text(WIDE).splitlines() if (words := line.split()) and words[0][:2] == "--"
    }
    assert set(lines) == {f"--{path}" for path in _all_paths()}
    assert "(default 0.1)" in lines["--optim.lr"]
    assert "(default true)" in lines["--channels_last"]
    assert "[float | none]" in lines["--optim.max_grad_norm"]


def test_help_has_the_doc_and_the_default_of_every_variant_of_a_setting():
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


def test_help_keeps_to_the_width_and_loses_no_word_by_it():
    narrow = help_text(100).partition("settings:")[2]
    assert max(map(len, narrow.splitlines())) <= 100
    assert narrow.split() == help_text(WIDE).partition("settings:")[2].split()


def test_settings_that_a_resume_may_change_are_starred_in_help():
    starred = {
        line.split()[0][2:] for line in help_text(WIDE).splitlines() if line.lstrip().startswith("--") and " * " in line
    }
    config = TrainConfig()
    assert starred == {path for path in _all_paths() if path != "epochs" and not changes_experiment(path, config)}


# Lists

URLS = ("https://one/cifar-10-binary.tar.gz", "http://two/cifar-10-binary.tar.gz")


def test_addresses_are_a_toml_list_on_the_command_line_and_in_a_file_and_come_back_from_the_resolved_config(write):
    text = json.dumps(URLS)
    file = write(f'[data]\nname = "cifar10"\ndownload = true\nurls = {text}\n')
    for words in (["--data.download", "--data.urls", text], [file]):
        config = config_of(*words)
        assert config.data.urls == URLS
        assert config_of(write(as_toml(config))).data.urls == URLS
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config_of(file, "--data.urls", "[]").data.urls == ()


@pytest.mark.parametrize("text", ["http://one/x", '["ftp://one/x"]', "[1]", '["file:///x"]', "none", "true"])
def test_what_is_no_list_of_addresses_is_told(text):
    (line,) = mistakes("--data.download", "--data.urls", text)
    assert line.startswith("command line: data.urls = ")
    assert "should be a list of http or https addresses, as [" in line


def test_addresses_without_download_are_told():
    (line,) = mistakes("--data.urls", '["http://one/x"]')
    assert line == "data.urls has no effect without data.download: set data.download = true or remove data.urls"


@pytest.mark.parametrize("name", ["generated10", "image_folder"])
def test_only_cifar_is_downloaded(name):
    (line,) = mistakes("--data.name", name, "--data.download")
    assert "belongs to data.name = cifar10 | cifar100" in line


@pytest.mark.parametrize("words", [["--data.download"], ["--data.download", "--data.urls", '["http://one/x"]']])
def test_who_asks_for_a_download_has_named_the_data(words):
    assert from_command_line(words).names_data


def test_the_cache_folder_is_a_path_or_none():
    for text, expected in (("/somewhere", Path("/somewhere")), ("none", None)):
        assert config_of("--data.name", "image_folder", "--data.cache", text).data.cache == expected


# What a resume may change


@pytest.mark.parametrize(
    "path",
    ["seed", "global_batch_size", "grad_accum_steps", "precision", "optim.lr", "data.name", "data.split_seed",
     "data.augment.crop", "model.dropout", "schedule.patience", "early_stopping.patience", "early_stopping",
     "channels_last", "checkpoint.best_by", "exact.shards", "optim.ema_decay", "optim.beta2", "loss.label_smoothing",
     "data.augment.mixup", "init_from", "compile", "evaluation.flip_tta", "schedule.restore_best_on_drop", "data.normalize",
     "engine.compression"],
)  # fmt: skip
def test_what_the_curve_depends_on_makes_another_experiment(path):
    assert changes_experiment(path, TrainConfig())


@pytest.mark.parametrize(
    "path",
    ["run_dir", "data.root", "threads", "device", "timeout_seconds", "checkpoint.every_steps", "checkpoint.keep_last",
     "logging.every_steps", "logging.level", "logging.tensorboard", "logging.profile_steps", "data.placement",
     "evaluation.test_every_epoch", "data.download", "data.urls", "data.cache", "data.max_pixels", "scaling.num_workers"],
)  # fmt: skip
def test_what_the_curve_does_not_depend_on_may_change(path):
    assert not changes_experiment(path, TrainConfig())


@pytest.mark.parametrize(
    ("schedule", "refused"), [("constant", False), ("plateau", False), ("cosine", True), ("one_cycle", True)]
)
def test_more_epochs_are_the_same_experiment_only_where_the_schedule_does_not_depend_on_them(schedule, refused):
    assert changes_experiment("epochs", config_of("--schedule.name", schedule)) is refused


# Derived values


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 0.4), ("sqrt", 0.2)])
def test_the_learning_rate_grows_with_the_batch_as_asked(scaling, peak):
    config = config_of("--global_batch_size", "512", "--optim.lr_scaling", scaling, "--optim.lr_base_batch", "128")
    assert config.peak_lr == pytest.approx(peak, rel=1e-15)


def test_without_scaling_the_learning_rate_is_as_given():
    assert config_of("--global_batch_size", "512").peak_lr == 0.1


def test_best_by_auto_is_accuracy_where_there_is_validation():
    assert config_of().best_by == "accuracy"
    assert config_of("--data.validation_fraction", "0").best_by is None
    assert config_of("--checkpoint.best_by", "loss").best_by == "loss"
    assert config_of("--checkpoint.best_by", "none").best_by is None


def test_every_steps_says_when_a_save_is_due():
    every_third = config_of("--checkpoint.every_steps", "3").checkpoint
    assert [step for step in range(1, 10) if every_third.is_due(step)] == [3, 6, 9]
    assert not any(config_of().checkpoint.is_due(step) for step in range(10))


# Exact mode


@pytest.mark.parametrize(
    ("batch", "grad_accum_steps", "shards"),
    [(128, 1, 8), (8, 1, 8), (7, 1, 4), (20, 3, 4), (2, 1, 2), (1, 1, 1), (16, 16, 1), (24, 3, 8), (23, 3, 4)],
)
def test_auto_is_the_largest_power_of_two_up_to_8_that_a_micro_batch_allows_and_off_on_a_gpu(
    batch, grad_accum_steps, shards
):
    config = config_of("--global_batch_size", str(batch), "--grad_accum_steps", str(grad_accum_steps))
    assert config.exact.shards == "auto"
    assert config.shards_on("cpu") == shards
    assert config.shards_on("cuda") == 0
    assert config_of(
        "--global_batch_size", str(batch), "--grad_accum_steps", str(grad_accum_steps), "--exact.shards", str(shards)
    )


@pytest.mark.parametrize("shards", [0, 1, 2, 64, 128])
def test_shards_that_were_given_hold_on_every_device(shards, write):
    for config in (config_of("--exact.shards", str(shards)), config_of(write(f"[exact]\nshards = {shards}\n"))):
        assert config.shards_on("cpu") == config.shards_on("cuda") == shards


COMPRESSED = ("--engine.compression", "bfloat16")


def test_auto_shards_mean_fast_mode_if_gradients_are_compressed():
    assert config_of(*COMPRESSED).shards_on("cpu") == 0
    assert config_of(*COMPRESSED, "--exact.shards", "0").compression == "bfloat16"
    assert config_of("--engine.compression", "none").shards_on("cpu") == 8


def test_compressed_gradients_tie_a_run_to_its_engine():
    def refused(old: TrainConfig, new: TrainConfig) -> list[str]:
        return [path for path, *_ in differences(old, new) if changes_experiment(path, new)]

    ddp, fsdp, compressed = config_of(), config_of("--engine.name", "fsdp"), config_of(*COMPRESSED)
    assert refused(ddp, fsdp) == refused(fsdp, ddp) == []
    assert refused(compressed, fsdp) == refused(ddp, compressed) == ["engine.compression"]


def test_auto_can_be_asked_for_in_a_file(write):
    assert config_of(write('[exact]\nshards = "auto"\n')).exact.shards == "auto"
    assert config_of(write("[exact]\nshards = 4\n"), "--exact.shards", "auto").exact.shards == "auto"


def test_a_wrong_number_of_shards_in_a_file_is_told_with_its_line(write):
    file = write("[exact]\nshards = 6\n")
    assert mistakes(file) == (
        f"{file}:2: exact.shards = 6: should be a power of two, as 8, or 0 for fast mode, or auto",
    )


def refusal(config: TrainConfig, world_size: int, device: str = "cpu") -> str:
    with pytest.raises(InputError) as caught:
        config.check_world_size(world_size, device)
    (line,) = caught.value.lines
    return line


def test_more_processes_than_shards_are_refused_with_what_would_do():
    assert refusal(config_of("--exact.shards", "4"), 5) == (
        "exact.shards = 4 is less than the 5 processes: start at most 4; "
        "or begin another run with exact.shards = 8, or with 0, fast mode"
    )
    assert "exact.shards = 2 (auto) is less than the 3 processes" in refusal(config_of("--global_batch_size", "2"), 3)
    for world_size, enough in ((9, 16), (16, 16), (17, 32), (64, 64), (65, 128)):
        assert f"exact.shards = {enough}, or with 0" in refusal(config_of(), world_size)


@pytest.mark.parametrize(
    ("words", "world_size", "device"),
    [
        ([], 8, "cpu"),
        ([], 100, "cuda"),
        (["--exact.shards", "0"], 100, "cpu"),
        (["--exact.shards", "4"], 3, "cpu"),
        (["--exact.shards", "4"], 4, "cuda"),
        (["--exact.shards", "1"], 1, "cpu"),
    ],
)
def test_as_many_processes_as_shards_are_welcome_and_any_number_in_fast_mode(words, world_size, device):
    config_of(*words).check_world_size(world_size, device)


# Without torch


def test_the_config_and_the_command_import_neither_torch_nor_what_is_slow():
    code = (
        "import sys, distributed.config, distributed.train, distributed.run.folder; "
        "print(*{'torch', 'ray', 'deepspeed', 'matplotlib', 'tensorboard', 'torchvision'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == []
