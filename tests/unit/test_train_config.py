import pytest
from kit.configs import config_of, mistakes

from distributed.config import TrainConfig, changes_experiment, differences
from distributed.errors import InputError


@pytest.mark.parametrize(
    "path",
    ["seed", "global_batch_size", "grad_accum_steps", "precision", "optim.lr", "data.name", "data.split_seed",
     "data.augment.crop", "model.dropout", "schedule.patience", "early_stopping.patience", "early_stopping",
     "channels_last", "checkpoint.best_by", "exact.shards", "optim.ema_decay", "optim.beta2", "loss.label_smoothing",
     "data.augment.mixup", "init_from", "compile", "evaluation.flip_tta", "schedule.restore_best_on_drop", "data.normalize",
     "engine.compression"],
)  # fmt: skip
def test_settings_that_change_the_curve_change_the_experiment(path):
    assert changes_experiment(path, TrainConfig())


@pytest.mark.parametrize(
    "path",
    ["run_dir", "data.root", "threads", "device", "timeout_seconds", "checkpoint.every_steps", "checkpoint.keep_last",
     "logging.every_steps", "logging.level", "logging.tensorboard", "logging.profile_steps", "data.placement",
     "evaluation.test_every_epoch", "data.download", "data.urls", "data.cache", "data.max_pixels", "scaling.num_workers"],
)  # fmt: skip
def test_operational_settings_may_change(path):
    assert not changes_experiment(path, TrainConfig())


@pytest.mark.parametrize(
    ("schedule", "refused"), [("constant", False), ("plateau", False), ("cosine", True), ("one_cycle", True)]
)
def test_epochs_may_change_if_the_schedule_ignores_them(schedule, refused):
    assert changes_experiment("epochs", config_of("--schedule.name", schedule)) is refused


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 0.4), ("sqrt", 0.2)])
def test_the_learning_rate_scales_with_the_batch(scaling, peak):
    config = config_of("--global_batch_size", "512", "--optim.lr_scaling", scaling, "--optim.lr_base_batch", "128")
    assert config.peak_lr == pytest.approx(peak, rel=1e-15)


def test_without_scaling_the_learning_rate_is_unchanged():
    assert config_of("--global_batch_size", "512").peak_lr == 0.1


def test_best_by_auto_is_accuracy_if_there_is_validation():
    assert config_of().best_by == "accuracy"
    assert config_of("--data.validation_fraction", "0").best_by is None
    assert config_of("--checkpoint.best_by", "loss").best_by == "loss"
    assert config_of("--checkpoint.best_by", "none").best_by is None


def test_every_steps_says_when_a_save_is_due():
    every_third = config_of("--checkpoint.every_steps", "3").checkpoint
    assert [step for step in range(1, 10) if every_third.is_due(step)] == [3, 6, 9]
    assert not any(config_of().checkpoint.is_due(step) for step in range(10))


@pytest.mark.parametrize(
    ("batch", "grad_accum_steps", "shards"),
    [(128, 1, 8), (8, 1, 8), (7, 1, 4), (20, 3, 4), (2, 1, 2), (1, 1, 1), (16, 16, 1), (24, 3, 8), (23, 3, 4)],
)
def test_auto_shards_fit_the_micro_batch_and_are_off_on_cuda(batch, grad_accum_steps, shards):
    config = config_of("--global_batch_size", str(batch), "--grad_accum_steps", str(grad_accum_steps))
    assert config.exact.shards == "auto"
    assert config.shards_on("cpu") == shards
    assert config.shards_on("cuda") == 0
    assert config_of(
        "--global_batch_size", str(batch), "--grad_accum_steps", str(grad_accum_steps), "--exact.shards", str(shards)
    )


@pytest.mark.parametrize("shards", [0, 1, 2, 64, 128])
def test_explicit_shards_apply_on_every_device(shards, write):
    for config in (config_of("--exact.shards", str(shards)), config_of(write(f"[exact]\nshards = {shards}\n"))):
        assert config.shards_on("cpu") == config.shards_on("cuda") == shards


COMPRESSED = ("--engine.compression", "bfloat16")


def test_compressed_gradients_turn_auto_shards_off():
    assert config_of(*COMPRESSED).shards_on("cpu") == 0
    assert config_of(*COMPRESSED, "--exact.shards", "0").compression == "bfloat16"
    assert config_of("--engine.compression", "none").shards_on("cpu") == 8


def test_compressed_gradients_tie_a_run_to_its_engine():
    def refused(old: TrainConfig, new: TrainConfig) -> list[str]:
        return [path for path, *_ in differences(old, new) if changes_experiment(path, new)]

    ddp, fsdp, compressed = config_of(), config_of("--engine.name", "fsdp"), config_of(*COMPRESSED)
    assert refused(ddp, fsdp) == refused(fsdp, ddp) == []
    assert refused(compressed, fsdp) == refused(ddp, compressed) == ["engine.compression"]


def test_auto_shards_can_be_set_in_a_file(write):
    assert config_of(write('[exact]\nshards = "auto"\n')).exact.shards == "auto"
    assert config_of(write("[exact]\nshards = 4\n"), "--exact.shards", "auto").exact.shards == "auto"


def test_a_wrong_number_of_shards_is_reported_with_its_line(write):
    file = write("[exact]\nshards = 6\n")
    assert mistakes(file) == (
        f"{file}:2: exact.shards = 6: should be a power of two, e.g. 8, or 0 for fast mode, or auto",
    )


def refusal(config: TrainConfig, world_size: int, device: str = "cpu") -> str:
    with pytest.raises(InputError) as caught:
        config.check_world_size(world_size, device)
    (line,) = caught.value.lines
    return line


def test_more_processes_than_shards_are_refused():
    assert refusal(config_of("--exact.shards", "4"), 5) == (
        "exact.shards = 4 is less than the 5 processes: start at most 4, or a new run with exact.shards = 8, "
        "or 0 for fast mode"
    )
    assert refusal(config_of("--global_batch_size", "2"), 3) == (
        "exact.shards = 2 (auto) is less than the 3 processes: start at most 2, or a new run with exact.shards = 4 and "
        "global_batch_size = 4 or more"
    )
    for world_size, enough in ((9, 16), (16, 16), (17, 32), (64, 64), (65, 128)):
        assert f"exact.shards = {enough}, or 0 for" in refusal(config_of(), world_size)


@pytest.mark.parametrize(
    ("arguments", "world_size", "device"),
    [
        ([], 8, "cpu"),
        ([], 100, "cuda"),
        (["--exact.shards", "0"], 100, "cpu"),
        (["--exact.shards", "4"], 3, "cpu"),
        (["--exact.shards", "4"], 4, "cuda"),
        (["--exact.shards", "1"], 1, "cpu"),
    ],
)
def test_up_to_as_many_processes_as_shards_are_accepted(arguments, world_size, device):
    config_of(*arguments).check_world_size(world_size, device)
