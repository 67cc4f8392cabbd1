"""Bad settings, each named: one clear line each, exit code 2, and an untouched run folder."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from kit.abuse import assert_outcome, call, untouched
from kit.commands import ROOT

from distributed.config.leaves import leaves

HUGE = str(10**30)

# (setting, bad value, substring of the message); on the command line, after e.g. the data.name that it needs.
VALUES: list[tuple[str, str, str]] = [
    ("run_dir", "", "should be a path"),
    ("run_dir", "x" * 300, "at most 255 bytes per name"),
    ("seed", "-1", "greater than or equal to 0"),
    ("seed", str(2**63), "less than"),
    ("epochs", "0", "greater than 0"),
    ("epochs", "true", "valid integer"),
    ("epochs", "1e30", "valid integer"),
    ("epochs", HUGE, "less than 2**63"),
    ("epochs", "9" * 5000, "(5,000 characters): should be a valid integer"),
    ("epochs", "[" * 3000, "should be a valid integer"),
    ("global_batch_size", "1.5", "valid integer"),
    ("global_batch_size", HUGE, "less than 2**63"),
    ("grad_accum_steps", "none", "grad_accum_steps = none: should be a valid integer"),
    ("grad_accum_steps", "1000", "is more than global_batch_size = 128"),
    ("precision", "fp16", "'auto', 'float32', 'tf32', 'bfloat16', 'float16' or 'float64'"),
    ("precision", "a\nb", "precision = 'a\\nb': should be"),
    ("channels_last", "1", "valid boolean"),
    ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
    ("threads", "1000000", "less than or equal to 4096"),
    ("timeout_seconds", "1e300", "less than or equal to 10000000"),
    ("timeout_seconds", "0", "greater than 0"),
    ("scaling.num_workers", "0", "greater than or equal to 1"),
    ("scaling.min_workers", "0", "greater than or equal to 1"),
    ("scaling.min_workers", "3", "is more than scaling.num_workers = 2"),
    ("scaling.cpus_per_worker", "0.5", "valid integer"),
    ("scaling.gpus_per_worker", "2", "less than or equal to 1"),
    ("scaling.placement", "PACK", "'pack', 'spread', 'strict_pack' or 'strict_spread'"),
    ("scaling.max_failures", "-1", "greater than or equal to 0"),
    ("scaling.wait_seconds", "1e300", "less than or equal to 10000000"),
    ("scaling.resize_seconds", "0", "greater than 0"),
    ("scaling.resize_seconds", "5", "has no effect: the number of workers is fixed; set scaling.min_workers too"),
    ("scaling.storage_path", "", "should be a path"),
    ("scaling.num_workers", "2", "scaling is for python -m launch.ray_train"),
    ("sweep", "3", "is a table"),
    ("data.name", "mnist", "should be one of cifar10"),
    ("data.root", "", "should be a path"),
    ("data.download", "2", "valid boolean"),
    ("data.urls", "ftp://host/file", "list of http or https addresses"),
    ("data.urls", '["https://host/cifar-10-binary.tar.gz"]', "no effect without data.download"),
    ("data.train_samples", "9", "greater than or equal to 10"),
    ("data.test_samples", HUGE, "less than or equal to 1000000"),
    ("data.cache", "", "should be a path"),
    ("model.input_side", "7", "greater than or equal to 8"),
    ("data.max_pixels", "0", "greater than or equal to 1"),
    ("data.validation_fraction", "1", "less than or equal to 0.9"),
    ("data.split_seed", HUGE, "less than 2**63"),
    ("data.normalize", "none", "'mean_std' or 'unit'"),
    ("data.placement", "disk", "'auto', 'device' or 'host'"),
    ("data.augment.crop", "513", "less than or equal to 512"),
    ("data.classes", "1", "greater than or equal to 2"),
    ("data.options", "3", "is a table"),
    ("data.augment.flip", "maybe", "should be true, false or alternating"),
    ("data.augment.crop_padding", "edge", "'zero' or 'reflect'"),
    ("data.augment.mixup", "2", "less than or equal to 1"),
    ("data.augment.cutmix", "nan", "finite number"),
    ("data.augment.cutout", "-3", "greater than or equal to 0"),
    ("data.augment.low_res_epochs", "-1", "greater than or equal to 0"),
    ("data.augment.low_res_epochs", "2", "data.augment.low_res_epochs = 2 needs data.augment.low_res_side"),
    ("data.augment.low_res_side", "7", "greater than or equal to 8"),
    ("data.augment.low_res_side", "24", "has no effect with data.augment.low_res_epochs = 0: remove it"),
    ("data.augment.function", "erase", "should be an import path, package.module:function, e.g. net:erase"),
    ("data.augment.function", "3", "should be an import path"),
    (
        "data.augment.function",
        "no_such_module_anywhere:f",
        "data.augment.function = no_such_module_anywhere:f: there is no",
    ),
    (
        "model.name",
        "resnet",
        "should be one of alexnet | improved_alexnet | cifar_alexnet | cifar_alexnet_bn | fast_alexnet | package.module",
    ),
    (
        "model.name",
        "no_such_module_anywhere:make",
        "there is no module no_such_module_anywhere; run the command in the",
    ),
    ("model.options", "3", "is a table"),
    ("model.init", "zero", "'torch' or 'he'"),
    ("model.dropout", "1", "less than 1"),
    ("init_from", "\udcff", "UTF-8"),
    ("compile", "on", "valid boolean"),
    ("grad_checkpointing", "true", "grad_checkpointing"),
    ("grad_checkpointing.enabled", "yes", "valid boolean"),
    ("grad_checkpointing.modules", "5", "should be a list of the names of modules"),
    ("grad_checkpointing.modules", '["conv", "conv"]', "should name each module once"),
    ("loss.label_smoothing", "-inf", "finite number"),
    ("loss.name", "focal", "should be one of cross_entropy | package.module:function; e.g. net:loss"),
    ("loss.name", "./net.py:focal", "should be one of cross_entropy"),
    (
        "loss.name",
        "no_such_module_anywhere:loss",
        "loss.name = no_such_module_anywhere:loss: there is no module no_such",
    ),
    ("loss.name", "json.decodr:loss", "there is no module json.decodr; did you mean json.decoder?"),
    ("loss.options", "3", "is a table"),
    ("model.widths", "[64, 256]", "should be a list of three numbers from 1 to 4096, e.g. [64, 256, 256]"),
    ("model.widths", "[64, 256, 5000]", "three numbers from 1 to 4096"),
    ("model.widths", "64", "should be a list of three numbers"),
    ("model.whitening", "some", "valid boolean"),
    ("model.activation", "tanh", "should be 'relu' or 'gelu'"),
    ("optim.name", "lion", "should be one of sgd | adamw | muon"),
    ("optim.bias_lr_factor", "0", "greater than 0"),
    ("optim.adamw_lr", "inf", "finite number"),
    ("optim.lr", "nan", "finite number"),
    ("optim.lr", "101", "less than or equal to 100"),
    ("optim.lr_scaling", "cubic", "'none', 'linear' or 'sqrt'"),
    ("optim.lr_base_batch", "0", "greater than 0"),
    ("optim.decay_norm_and_bias", "0", "valid boolean"),
    ("optim.max_grad_norm", "0", "greater than 0"),
    ("optim.ema_decay", "1", "less than 1"),
    ("optim.momentum", "-0.1", "greater than or equal to 0"),
    ("optim.nesterov", "yes", "valid boolean"),
    ("optim.weight_decay", "inf", "finite number"),
    ("optim.beta1", "1", "less than 1"),
    ("optim.beta2", "x", "valid number"),
    ("optim.eps", "0", "greater than 0"),
    ("schedule.name", "step", "should be one of constant | cosine | linear | one_cycle | plateau"),
    ("schedule.warmup_epochs", "10", "must be less than epochs = 10"),
    ("schedule.final_factor", "1", "less than 1"),
    ("schedule.warmup_fraction", "0", "greater than 0"),
    ("schedule.start_factor", "true", "valid number"),
    ("schedule.metric", "f1", "'accuracy' or 'loss'"),
    ("schedule.factor", "1", "less than 1"),
    ("schedule.patience", "-1", "greater than or equal to 0"),
    ("schedule.min_delta", "-1", "greater than or equal to 0"),
    ("schedule.cooldown", "0.5", "valid integer"),
    ("schedule.max_drops", "some", "valid integer"),
    ("schedule.restore_best_on_drop", "3", "valid boolean"),
    ("early_stopping.metric", "top5", "'accuracy' or 'loss'"),
    ("early_stopping.patience", "0", "greater than 0"),
    ("early_stopping.min_delta", "nan", "finite number"),
    ("engine.name", "zero", "should be one of ddp | fsdp | deepspeed"),
    ("engine.reshard_after_forward", "maybe", "valid boolean"),
    ("engine.zero_stage", "4", "less than or equal to 3"),
    ("engine.overlap_comm", "some", "valid boolean"),
    ("engine.offload_optimizer", "nvme", "valid boolean"),
    ("engine.bucket_mib", "1025", "less than or equal to 1024"),
    ("engine.compression", "fp8", "'bfloat16'"),
    ("exact.shards", "12", "a power of two"),
    ("exact.shards", str(2**70), "less than 2**63"),
    ("exact.shards", str(2**40), "is more than the 128 images"),
    ("evaluation.batch_size", "0", "greater than 0"),
    ("evaluation.flip_tta", "none", "valid boolean"),
    ("evaluation.shift_tta", "-1", "greater than or equal to 0"),
    (
        "evaluation.metrics",
        "net:brier",
        'should be a list of import paths, package.module:function, e.g. ["net:brier"]',
    ),
    ("evaluation.metrics", '["brier"]', "should be a list of import paths"),
    ("evaluation.metrics", '["a:brier", "b:brier"]', "two metrics have the name brier; rename one of the functions"),
    ("evaluation.metrics", '["net:accuracy"]', "accuracy is measured anyway; rename the function, or remove it"),
    (
        "evaluation.metrics",
        '["no_such_module_anywhere:f"]',
        "evaluation.metrics = no_such_module_anywhere:f: there is no",
    ),
    ("evaluation.test_every_epoch", "7", "valid boolean"),
    ("checkpoint.every_steps", "-1", "greater than or equal to 0"),
    ("checkpoint.every_minutes", "inf", "finite number"),
    ("checkpoint.max_overhead", "0", "greater than 0"),
    ("checkpoint.max_overhead", "1.5", "less than or equal to 1"),
    ("checkpoint.max_overhead", "5%", "number"),
    ("cuda_graphs", "maybe", "valid boolean"),
    ("checkpoint.keep_last", "0", "greater than or equal to 1"),
    ("checkpoint.upload_to", "bucket/prefix", "should be a URL such as s3://BUCKET/PREFIX"),
    ("checkpoint.upload_to", "ftp://host/prefix", "should be a URL such as s3://BUCKET/PREFIX"),
    ("checkpoint.upload_to", "s3://", "should be a URL such as s3://BUCKET/PREFIX"),
    ("checkpoint.upload_to", "s3://key:secret@bucket/prefix", "should be a URL such as s3://BUCKET/PREFIX"),
    ("checkpoint.upload_to", "s3://bucket/step-*", "without spaces, ?, *, # and brackets"),
    ("checkpoint.upload_to", "file://folder", "file:///FOLDER"),
    ("checkpoint.upload_to", "file:///a\nb", "upload_to = 'file:///a\\nb': should be a URL"),
    ("checkpoint.upload_to", "file:///dev/null/x", "name another folder"),
    ("checkpoint.best_by", "luck", "'auto', 'accuracy', 'loss' or 'none'"),
    ("logging.every_steps", "0", "greater than 0"),
    ("logging.level", "TRACE", "'DEBUG', 'INFO' or 'WARNING'"),
    ("logging.tensorboard", "5", "valid boolean"),
    ("logging.curves", "5", "valid boolean"),
    ("logging.profile_steps", "1001", "less than or equal to 1000"),
    ("logging.wandb.project", "a/b", "a name of at most 128 characters for a project, without / \\ # ? % :"),
    ("logging.wandb.entity", " ", "a name of at most 128 characters for an entity"),
    ("logging.wandb.name", "x" * 129, "a name of at most 128 characters for a run"),
    ("logging.wandb.tags", '["a", "a"]', "a list of different tags of 1 to 64 characters"),
    ("logging.wandb.tags", "a", "a list of different tags of 1 to 64 characters"),
    ("logging.wandb.mode", "disabled", "'online' or 'offline'"),
    ("logging.mlflow.tracking_uri", "localhost", "is a folder, which MLflow no longer writes to"),
    ("logging.mlflow.tracking_uri", "https://", "the address of a server or a database"),
    ("logging.mlflow.tracking_uri", "localhost:5000", "the address of a server or a database"),
    ("logging.mlflow.tracking_uri", "http://me:hidden@host", "= http://***@host: has a password or a token"),
    ("logging.mlflow.tracking_uri", "postgresql://me:hidden@host/x", "set MLFLOW_TRACKING_URI instead"),
    ("logging.mlflow.tracking_uri", "mysql://host/x?password=hidden", "= mysql://host/x?password=***: has a password"),
    ("logging.mlflow.experiment", "", "a name of at most 250 characters for an experiment"),
    ("logging.mlflow.name", "a\nb", "a name of at most 250 characters for a run"),
    ("logging.sinks", '["my_sinks"]', "a list of different import paths package.module:Class"),
    ("logging.sinks", '["my_sinks:A", "my_sinks:A"]', "a list of different import paths"),
]

FILES: dict[str, tuple[str | bytes, str]] = {
    "syntax": ("epochs = = 3", "not valid TOML"),
    "a duplicate table": ("[optim]\nlr = 1\n[optim]\nlr = 2", "not valid TOML"),
    "a duplicate key": ("seed = 1\nseed = 2", "not valid TOML"),
    "truncated": ('[data]\nname = "gen', "not valid TOML"),
    "an endless number": ("epochs = " + "9" * 5000, "not valid TOML"),
    "endless nesting": ("a = " + "[" * 3000, "not valid TOML"),
    "not UTF-8": (b"\xff\xfe\x00", "not UTF-8 text"),
    "a PNG": (b"\x89PNG\r\n\x1a\n", "not UTF-8 text"),
    "UTF-16": ("epochs = 3".encode("utf-16"), "not UTF-8 text"),
    "Latin-1": ('run_dir = "caf\u00e9"'.encode("latin-1"), "not UTF-8 text"),
    "zero bytes": (b"epochs = 3\0", "not valid TOML"),
    "a lone carriage return": (b"epochs = 3\rseed = 1", "not valid TOML"),
    "a control character": ("epochs = 3 # \x07", "not valid TOML"),
    "an escape in a key": ('"\\u001b[2J" = 1', "'\\x1b[2J' = 1: unknown setting"),
    "an escape in a value": ('precision = "\\u001b[31m"', "precision = '\\x1b[31m': should be"),
    "a newline in a key": ('"a\\nerror: b" = 1', "'a\\nerror: b' = 1: unknown setting"),
    "right-to-left text": ('precision = "\\u202e"', "precision = '\\u202e'"),
    "an escape in extends": ('extends = "\\u001b[31m.toml"', "x1b[31m.toml': No such file"),
    "tables nested 900 deep": ("[" + ".".join(["a"] * 900) + "]\nx = 1", "nested more than 8 deep"),
    "keys nested 900 deep": (".".join(["a"] * 900) + " = 1", "nested more than 8 deep"),
    "lists nested 300 deep": ("epochs = " + "[" * 300 + "]" * 300, "nested more than 8 deep"),
    "inline tables nested 30 deep": ("epochs = " + "{a = " * 30 + "1" + "}" * 30, "nested more than 8 deep"),
    "an endless hexadecimal number": ("epochs = 0x" + "f" * 5000, "too large to show"),
    "a large number for a fraction": ("[optim]\nlr = 1" + "0" * 400, "optim.lr = 1000"),
    "a large number for a string": ("precision = 0x" + "f" * 5000, "too large to show"),
    "a long value": ('precision = "' + "x" * 100_000 + '"', "(100,000 characters)"),
    "a long key": ("x" * 100_000 + " = 1", "(100,000 characters) = 1: unknown setting"),
    "more than a mebibyte": ("#" * (2**20 + 1), "more than 1,048,576 bytes"),
    "an unknown home": ('extends = "~nobody-of-this-name/base.toml"', "base.toml: No such file"),
    "extends a long name": (f'extends = "{"x" * 300}"', "File name too long"),
    "JSON": ('{"epochs": 3}', "not valid TOML"),
    "YAML": ("epochs: 3", "not valid TOML"),
    "an unknown key": ("epoch = 3", "did you mean epochs?"),
    "an unknown section": ("[optimizer]\nlr = 3", "optimizer.lr = 3: unknown setting"),
    "an unknown empty section": ("[nonsense]", "nonsense: unknown setting"),
    "a dotted name in quotes": (
        '"optim.lr" = 1',
        ":1: optim.lr = 1: unknown setting; write a dotted name without quotes",
    ),
    "a section as a number": ("optim = 3", "is a section"),
    "a section as a list": ("[[optim]]\nlr = 1", "is a section"),
    "the data as a string": ('data = "cifar10"', "is a section"),
    "a name as a number": ("[data]\nname = 5", "data.name = 5: should be one of"),
    "a name as a list": ("[schedule]\nname = []", "schedule.name = []: should be one of"),
    "a name as a table": ("[optim.name]", "optim.name: should be one of"),
    "a value as a table": ("epochs = {a = 1}", "epochs = {'a': 1}: should be a valid integer"),
    "a value as a list": ("epochs = [1]", "epochs = [1]: should be a valid integer"),
    "a date": ("epochs = 2024-01-01", "epochs = 2024-01-01: should be a valid integer"),
    "not a number": ("[optim]\nlr = nan", ":2: optim.lr = nan: should be a finite number"),
    "infinite": ("timeout_seconds = inf", ":1: timeout_seconds = inf: should be a finite number"),
    "true for 1": ("epochs = true", "epochs = true: should be a valid integer"),
    "a string for a number": ('epochs = "3"', "epochs = 3: should be a valid integer"),
    "newlines in a value": ('precision = """a\nerror: b"""', "precision = 'a\\nerror: b'"),
    "a zero byte in a path": ('run_dir = "a\\u0000b"', "should be a path"),
    "a zero byte in the root": ('[data]\nname = "cifar10"\nroot = "a\\u0000b"', "should be a path"),
    "a number for a path": ("run_dir = 5", "run_dir = 5: "),
    "another variant's setting": ('[schedule]\nname = "constant"\npatience = 3', "belongs to schedule.name = plateau"),
    "extends itself": ('extends = "bad.toml"', "extends leads back"),
    "extends a missing file": ('extends = "none.toml"', "none.toml: No such file"),
    "extends a folder": ('extends = "."', "Is a directory"),
    "extends a number": ("extends = 3", "must be the name of one file"),
    "extends an empty name": ('extends = ""', "must be the name of one file"),
    "extends a zero byte": ('extends = "a\\u0000"', "must be the name of one file"),
    "extends a list": ('extends = ["a.toml", "b.toml"]', "must be the name of one file"),
}

WORDS: dict[str, tuple[list[str], str]] = {
    "not an option": (["--seed", "1", "stray"], "'stray': not an option"),
    "a short option": (["-x"], "'-x': not an option"),
    "no name": (["--=3"], "'--=3': not an option"),
    "no value": (["--epochs"], "--epochs: a value is missing"),
    "an empty value": (["--epochs="], "epochs = '': should be a valid integer"),
    "an unknown flag": (["--no-such"], "--no-such: unknown setting; --help lists all of them"),
    "an unknown flag of many dashes": (["--no-cuda"], "--no-cuda: unknown setting; did you mean device?"),
    "an unknown flag with a newline": (["--a\nb"], "--'a\\nb': unknown setting"),
    "an unknown flag with an escape": (["--a\x1b[2J"], "--'a\\x1b[2J': unknown setting"),
    "a stray escape": (["\x1b[2J"], "'\\x1b[2J': not an option"),
    "a name nested 900 deep": (["--" + ".".join(["a"] * 900), "1"], "unknown setting"),
    "a value nested 30 deep": (["--epochs", "{a=" * 30 + "1" + "}" * 30], "should be a valid integer"),
    "an endless hexadecimal number": (["--epochs", "0x" + "f" * 5000], "too large to show"),
    "a section without a value": (["--optim"], "--optim: a value is missing"),
    "a name of another tool": (["--batch-size", "64"], "batch_size = 64: unknown setting; did you mean global_batch_size?"),
    "processes": (["--gpus", "2"], "torchrun --nproc_per_node=N"),
    "a resume": (["--resume"], "the same command in the same run_dir resumes"),
    "an argument in another encoding": (["--precision", "\udce9"], "precision = '\\udce9'"),
    "an option for a value": (["--epochs", "--seed=1"], "--epochs: a value is missing"),
    "a duplicate option": (["--epochs", "1", "--epochs=2"], "--epochs: given twice"),
    "a duplicate option, spelled differently": (["--data.train-samples=20", "--data.train_samples=20"], "given twice"),
    "a section": (["--optim", "3"], "is a section"),
    "a nested section": (["--data.augment", "3"], "is a section"),
    "a setting below a value": (["--data.augment.crop.x", "3"], "data.augment.crop = {'x': 3}: should be a valid integer"),
    "an unknown option": (["--xyzzy", "3"], "unknown setting; --help lists all"),
    "an unknown option with a newline": (["--a\nb", "3"], "'a\\nb' = 3: unknown setting"),
    "two dots": (["--a..b", "3"], "a..b = 3: unknown setting"),
    "a trailing dot": (["--optim.", "3"], "unknown setting"),
    "momentum missing": (["--optim.momentum", "0"], "optim.nesterov = true needs momentum"),
    "scaling without base": (["--optim.lr_scaling", "sqrt"], "needs optim.lr_base_batch"),
    "a reflected crop of the image's size": (
        ["--data.augment.crop", "32", "--data.augment.crop_padding", "reflect"],
        "data.augment.crop = 32 with crop_padding = reflect is too much for images of 32 x 32 pixels: set it to 31 or less",
    ),
    "views shifted by the image's size": (
        ["--evaluation.shift_tta", "32"],
        "evaluation.shift_tta = 32 is too much for images of 32 x 32 pixels: set it to 31 or less",
    ),
    "checkpointing in exact mode": (
        ["--grad_checkpointing.enabled", "--exact.shards", "8"],
        "grad_checkpointing.enabled = true cannot be combined with exact.shards = 8",
    ),
    "checkpointing, compiled": (
        ["--grad_checkpointing.enabled", "--compile"],
        "grad_checkpointing.enabled = true cannot be combined with compile = true",
    ),
    "checkpointing at stage 3": (
        ["--grad_checkpointing.enabled", "--engine.name", "deepspeed", "--engine.zero_stage", "3"],
        "grad_checkpointing.enabled = true cannot be combined with engine.zero_stage = 3",
    ),
    "modules without checkpointing": (
        ["--grad_checkpointing.modules", '["conv"]'],
        "grad_checkpointing.modules has no effect without grad_checkpointing.enabled",
    ),
    "compiled in exact mode": (["--compile", "--exact.shards", "8"], "compile = true cannot be combined with exact.shards = 8"),
    "compressed in exact mode": (
        ["--engine.compression", "bfloat16", "--exact.shards", "4"],
        "engine.compression = bfloat16 cannot be combined with exact.shards = 4",
    ),
    "deepspeed and exact mode": (
        ["--engine.name", "deepspeed", "--exact.shards", "4"],
        "exact.shards = 4 cannot be combined with engine.name = deepspeed",
    ),
    "deepspeed in float64": (
        ["--engine.name", "deepspeed", "--precision", "float64"],
        "precision = float64 cannot be combined with engine.name = deepspeed",
    ),
    "deepspeed in float16": (
        ["--engine.name", "deepspeed", "--precision", "float16"],
        "precision = float16 cannot be combined with engine.name = deepspeed",
    ),
    "deepspeed compiled": (
        ["--engine.name", "deepspeed", "--compile"],
        "compile = true cannot be combined with engine.name = deepspeed",
    ),
    "overlap at stage 0": (
        ["--engine.name", "deepspeed", "--engine.zero_stage", "0", "--engine.overlap_comm"],
        "engine.overlap_comm has no effect at engine.zero_stage = 0",
    ),
    "an old deepspeed's option": (["--engine.name", "fsdp", "--engine.zero_stage", "2"], "engine.zero_stage"),
    "two archives": (
        ["--data.name=cifar10", "--data.download", '--data.urls=["http://x/cifar-10-python.tar.gz", "http://x/b"]',
         "--data.root=/dev/null"],
        "name mirrors of one archive",
    ),
}  # fmt: skip

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "RANK alone": ({"RANK": "0"}, "RANK set without WORLD_SIZE, LOCAL_RANK"),
    "no number": ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "should be a whole number"),
    "empty": ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, "should be a whole number"),
    "an empty world": (
        {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "RANK = 0: should be at least 0 and less than WORLD_SIZE"),
    "a rank beyond the world": (
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK = 2: should be at least 0 and less than WORLD_SIZE = 2"),
    "a negative rank": ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK = -1: should be at least 0"),
    "an empty node": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE = 0: should be from 1"),
    "a node larger than the world": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE = 3: should be from 1"),
    "no rendezvous address": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "MASTER_ADDR = '' and MASTER_PORT = ''"),
    "no port": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEET, "MASTER_PORT": "x"}, "MASTER_PORT = 'x'"),
    "a port beyond 65535": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEET, "MASTER_PORT": "70000"}, "'70000'"),
    "too many ranks": ({"RANK": "0", "WORLD_SIZE": "99", "LOCAL_RANK": "0", **MEET}, "less than the 99 processes"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input that is not refused ends with 99 instead of training."""
    process = ModuleType("distributed.run_process")
    process.run_to_exit_code = lambda *_: 99  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distributed.run_process", process)
    monkeypatch.setattr("distributed.topology.Topology.has_waiting_peers", False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def variant_of(path: str) -> list[str]:
    """Return the arguments that choose the section with this setting; generated images otherwise."""
    section, _, name = path.partition(".")
    [*variants] = [leaf.variant for leaf in leaves() if path.startswith(leaf.path)]
    chosen = [] if name == "name" else ["--data.name", "generated10"]
    if variants and variants[0] and name != "name":
        chosen = [*(chosen if section != "data" else []), f"--{section}.name", variants[0].split(" | ")[0]]
    return chosen


@pytest.mark.parametrize(("path", "value", "message"), VALUES, ids=[f"{p}={v[:12]!a}" for p, v, _ in VALUES])
def test_a_bad_value(path: str, value: str, message: str, tmp_path: Path) -> None:
    with untouched(tmp_path):
        arguments = [] if path == "run_dir" else ["--run_dir", tmp_path / "run"]
        assert_outcome(call("train", *variant_of(path), *arguments, f"--{path}={value}"), path, message)


def test_every_setting_has_a_bad_value() -> None:
    assert {leaf.path for leaf in leaves()} - {path for path, _, _ in VALUES} == set()


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    file = tmp_path / "bad.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with untouched(tmp_path):
        assert_outcome(call("train", file), message, str(tmp_path))


NOT_REGULAR = [
    "missing", "folder", "circular link", "link to nothing", "below a file", "long", "pipe", "socket", "device", "sparse",
]  # fmt: skip


@pytest.mark.parametrize("extended", [False, True], ids=["named", "extended"])
@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_a_config_that_is_not_a_regular_file(
    kind: str, extended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    file = tmp_path / ("x" * 5000 if kind == "long" else "bad.toml")
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("bad.toml")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "sparse":
        with file.open("wb") as content:
            content.truncate(10 * 2**30)
    elif "link" in kind:
        file.symlink_to(file if "circular" in kind else tmp_path / "nothing")
    elif kind == "below a file":
        (tmp_path / "text").write_text("")
        file = tmp_path / "text" / "bad.toml"
    if extended:
        (tmp_path / "good.toml").write_text(f'extends = "{file}"')
    with untouched(tmp_path):
        message = call("train", tmp_path / "good.toml" if extended else file)
        remedy = f"correct `extends` in {tmp_path}/good.toml" if extended else "the first argument names a TOML file"
        assert_outcome(message, str(tmp_path)[:40], remedy)


@pytest.mark.parametrize("length", [33, 2000])
def test_a_long_chain_of_files_is_refused(length: int, tmp_path: Path) -> None:
    for number in range(length):
        (tmp_path / f"{number}.toml").write_text(f'extends = "{number + 1}.toml"')
    assert_outcome(call("train", tmp_path / "0.toml"), "chain of more than 32 files")


def many_arguments(count: int) -> list[str]:
    return [argument for number in range(count) for argument in (f"--optim.x{number}", "1")]


@pytest.mark.parametrize("count", [21, 5000, 20_000])
@pytest.mark.parametrize("place", ["file", "section", "arguments", "strays"])
def test_thousands_of_mistakes_are_reported_in_twenty_lines(place: str, count: int, tmp_path: Path) -> None:
    lines = "".join(f"optim_lr{number} = {number}\n" for number in range(count))
    (tmp_path / "bad.toml").write_text(f"[nonsense]\n{lines}" if place == "section" else lines)
    arguments: list[object] = [tmp_path / "bad.toml"]
    if place in ("arguments", "strays"):
        arguments = [*many_arguments(count)] if place == "arguments" else ["--seed=1", *["stray"] * count]
    before = time.monotonic()
    found = call("train", *arguments)
    assert time.monotonic() - before < 20  # takes one or two; it once took minutes
    assert_outcome(found, f"and {count - 20:,} more mistake", lines=21)


RUN_FILES = ("config.toml", "metrics.jsonl", "digests.jsonl", "status.json", "attempts.jsonl", "attempt.json", ".lock")


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_pipe_instead_of_a_file_of_the_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    with untouched(tmp_path):
        found = call("train", "--data.name=generated10", "--run_dir", tmp_path / "run")
        assert_outcome(found, f"{tmp_path / 'run' / name} is not a regular file")


COMMANDS = ("compare", "report.__main__", "runs.__main__", "evaluate", "predict", "export.__main__")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_instead_of_the_config_of_a_run(command: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "config.toml")
    more = {"compare": [tmp_path / "run"], "predict": ["image.png"]}.get(command, [])
    found = call(command, tmp_path / "run", *more)
    if command == "runs.__main__":  # a list of runs omits none
        assert (found.code, "unknown" in found.out) == (0, True)
    else:
        assert_outcome(found, str(tmp_path / "run"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tilde_is_the_home_folder(command: str, tmp_path: Path) -> None:
    more = {"compare": ["~/b"], "predict": ["image.png"]}.get(command, [])
    assert_outcome(call(command, "~/a", *more, HOME=str(tmp_path)), f"{tmp_path}/a")


@pytest.mark.parametrize("out", ["/dev/null", "", "table", "x" * 300 + ".json", "/dev/null/table.json"])
def test_a_file_of_results_that_cannot_be_written(out: str, tmp_path: Path) -> None:
    arguments = ("--only", "I-10", "--data.root", tmp_path, "--runs", tmp_path / "runs")
    assert_outcome(call("experiments.__main__", *arguments, "--out", out), "--out")


@pytest.mark.parametrize("name", WORDS)
def test_bad_arguments(name: str, tmp_path: Path) -> None:
    arguments, message = WORDS[name]
    data = [] if "--data.name=cifar10" in arguments else ["--data.name=generated10"]
    with untouched(tmp_path):
        assert_outcome(call("train", "--run_dir", tmp_path / "run", *data, *arguments), message)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_bad_environment(name: str, tmp_path: Path) -> None:
    environment, message = ENVIRONMENTS[name]
    arguments = ("--data.name=generated10", "--exact.shards=8", "--run_dir", tmp_path / "run")
    with untouched(tmp_path):
        assert_outcome(call("train", *arguments, **environment), message)


def test_each_mistake_is_a_line(tmp_path: Path) -> None:
    wrong = ("--epochs=0", "--seed=x", "--optim.lr=nan", "--data.augment.crop=999", "--nonsense=1")
    assert_outcome(call("train", "--data.name=generated10", "--run_dir", tmp_path / "run", *wrong), "epochs", lines=5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs=" + "9" * 5000],
        ["--precision=a\nb"],
        ["/dev/null/x.toml"],
        ["--data.name=generated10", "--model.name=a:b"],
    ],
    ids=repr,
)
def test_the_real_command(arguments: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "distributed.train", *arguments, "--device=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.stderr
    assert result.stderr.startswith("error: ")
