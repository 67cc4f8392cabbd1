import pytest
from kit.configs import config_of, mistakes

from distributed.config import hints, toml_value


def test_a_wrong_value_is_reported_with_file_and_line(write):
    file = write("seed = 1\n\n[optim]\nlr = -0.5\n")
    assert mistakes(file) == (f"{file}:4: optim.lr = -0.5: should be greater than 0",)


def test_a_wrong_value_in_a_base_names_the_base(write):
    base = write("# a comment\nepochs = 0\n", "base.toml")
    assert mistakes(write('extends = "base.toml"\n')) == (f"{base}:2: epochs = 0: should be greater than 0",)


def test_a_value_fixed_on_the_command_line_is_accepted(write):
    assert config_of(write("epochs = 0\n"), "--epochs", "1").epochs == 1


def test_the_place_is_where_the_value_was_last_set(write):
    assert mistakes(write("epochs = 1\n"), "--epochs", "0") == ("command line: epochs = 0: should be greater than 0",)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--epochs", "true"], "epochs = true: should be a valid integer"),
        (["--epochs", "1.5"], "epochs = 1.5: should be a valid integer"),
        (["--optim.lr", "inf"], "optim.lr = inf: should be a finite number"),
        (["--optim.lr", "fast"], "optim.lr = fast: should be a valid number"),
        (
            ["--precision", "half"],
            "precision = half: should be 'auto', 'float32', 'tf32', 'bfloat16', 'float16' or 'float64'",
        ),
        (
            ["--schedule.name", "platoe"],
            "schedule.name = platoe: should be one of constant | cosine | linear | one_cycle | plateau",
        ),
        (
            ["--data.name", "mnist"],
            "data.name = mnist: should be one of cifar10 | cifar100 | generated10 | generated100 | image_folder "
            "| arrays | package.module:function; e.g. mydata:arrays for the function arrays in ./mydata.py",
        ),
        (["--data.augment.crop", "-1"], "data.augment.crop = -1: should be greater than or equal to 0"),
        (["--early_stopping.patience", "0"], "early_stopping.patience = 0: should be greater than 0"),
        *[
            (
                ["--exact.shards", text],
                f"exact.shards = {text}: should be a power of two, e.g. 8, or 0 for fast mode, or auto",
            )
            for text in ("3", "12", "-1", "true", "false", "8.0", "none", "atuo")
        ],
    ],
)
def test_a_wrong_value_says_what_it_should_be(arguments, complaint):
    assert mistakes(*arguments) == (f"command line: {complaint}",)


def test_all_errors_are_reported_together_one_per_line(write):
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
        ("dta.x", "data"),
    ],
)
def test_a_misspelled_setting_is_recognized(option, meant):
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
def test_names_from_other_tools_are_recognized(option, meant):
    (line,) = mistakes(f"--{option}", "3")
    assert f"unknown setting; did you mean {meant}?" in line


def test_every_hint_names_a_setting():
    assert hints._OTHER_NAMES.keys() <= hints.known()
    assert not hints._MEANT.keys() & (hints.known() | hints._ADVICE.keys())


@pytest.mark.parametrize("option", ["dryrun", "dry-runn", "dry_run"])
def test_a_misspelled_dry_run_is_recognized(option):
    assert "give --dry-run there" in mistakes(f"--{option}", "3")[0]


@pytest.mark.parametrize("option", ["gpus", "nproc_per_node", "world_size"])
def test_the_number_of_processes_belongs_to_the_launcher(option):
    assert "torchrun --nproc_per_node=N" in mistakes(f"--{option}", "3")[0]


@pytest.mark.parametrize(
    ("arguments", "others"),
    [
        (["--optim.name", "lion", "--optim.lr", "-1"], ["optim.lr = -1"]),
        (["--optim.name", "lion", "--optim.beta1", "2"], ["optim.beta1 = 2"]),
        (["--optim.name", "lion", "--optim.momentum", "0.8"], []),
        (["--optim.name", "lion", "--optim.beta1", "0.5", "--optim.momentum", "0.8"], []),
        (["--optim.name", "lion", "--optim.lrr", "1"], ["optim.lrr = 1: unknown setting"]),
        (["--optim.name", "lion", "--epochs", "0", "--schedule.name", "x", "--schedule.patience", "-1"],
         ["schedule.name = x", "epochs = 0", "schedule.patience = -1"]),
        (["--data.name", "mnist", "--data.augment.crop", "999"], ["data.augment.crop = 999"]),
        (["--seed", "1", "stray", "--optim.lr", "-1"], ["optim.lr = -1"]),
        (["--epochs", "--optim.lr", "-1"], ["optim.lr = -1"]),
    ],
)  # fmt: skip
def test_one_mistake_hides_no_other(arguments, others):
    lines = mistakes(*arguments)[1:]
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
def test_a_value_is_spelled_as_in_a_file(value, text):
    assert toml_value(value) == text


def test_a_setting_unlike_all_others_points_to_help():
    assert mistakes("--xyzzy", "3") == ("command line: xyzzy = 3: unknown setting; --help lists all of them",)


def test_a_misspelled_section_is_reported_with_its_line(write):
    file = write("epochs = 3\n[optimm]\nlr = 0.1\n")
    (line,) = mistakes(file)
    assert "did you mean optim.lr?" in line
    assert line.startswith((f"{file}:2: ", f"{file}:3: "))


@pytest.mark.parametrize(
    ("arguments", "parts"),
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
def test_conflicts_are_explained(arguments, parts):
    (line,) = mistakes(*arguments)
    assert [part for part in parts if part not in line] == []


def test_settings_that_need_validation_are_refused_without():
    lines = mistakes(
        "--data.validation_fraction", "0", "--schedule.name", "plateau", "--early_stopping.patience", "3",
        "--checkpoint.best_by", "loss",
    )  # fmt: skip
    assert len(lines) == 3
    assert all("data.validation_fraction above 0" in line for line in lines)


def test_conflicts_wait_until_each_field_is_valid():
    assert mistakes("--optim.momentum", "0", "--epochs", "0") == ("command line: epochs = 0: should be greater than 0",)
