"""Suggestions for unknown settings. Imports no torch."""

import difflib
from functools import cache

from distributed.config.leaves import leaves

_OTHER_NAMES = {
    "global_batch_size": "batch_size batch bs batchsize train_batch_size per_device_batch_size mini_batch_size",
    "optim.lr": "learning_rate base_lr",
    "optim.weight_decay": "wd l2",
    "optim.name": "optimizer optimiser opt",
    "optim.max_grad_norm": "clip clip_norm grad_clip clip_grad gradient_clip_val gradient_clipping",
    "optim.ema_decay": "ema model_ema use_ema",
    "schedule.name": "scheduler lr_scheduler lr_schedule sched",
    "schedule.warmup_epochs": "warmup warmup_steps",
    "grad_accum_steps": "grad_accum accum accumulation accum_steps gradient_accumulation_steps accumulate_grad_batches",
    "epochs": "num_epochs max_epochs n_epochs num_train_epochs",
    "seed": "random_seed manual_seed",
    "precision": "amp fp16 bf16 half dtype mixed_precision use_amp",
    "device": "cuda no_cuda cpu accelerator",
    "run_dir": "out output out_dir output_dir save_dir save_path log_dir logdir work_dir workdir exp_dir run_name name",
    "data.name": "dataset data_set dataset_name",
    "data.root": "data_dir data_root data_path dataset_dir dataset_path dataroot datadir",
    "data.download": "fetch",
    "data.validation_fraction": "val_split val_fraction validation_split",
    "model.input_side": "side image_size img_size input_size",
    "model.name": "arch architecture network net backbone",
    "loss.label_smoothing": "smoothing",
    "engine.name": "strategy backend parallelism",
    "exact.shards": "deterministic reproducible",
    "evaluation.batch_size": "eval_batch_size test_batch_size val_batch_size",
    "evaluation.flip_tta": "tta",
    "logging.every_steps": "log_every log_interval log_steps logging_steps print_freq",
    "logging.level": "verbose log_level",
    "checkpoint.every_steps": "save_every save_freq save_steps save_interval",
    "timeout_seconds": "timeout",
    "init_from": "pretrained weights finetune load_from",
}
"""Setting -> names for it in other tools, and likely guesses."""

_MEANT = {name: setting for setting, names in _OTHER_NAMES.items() for name in names.split()}
_PROCESSES = "the launcher sets the number of processes: torchrun --nproc_per_node=N -m distributed.train ..."
_RESUME = "the same command in the same run_dir resumes; init_from starts from another run's weights"
_ADVICE = {
    **dict.fromkeys(("gpus", "num_gpus", "ngpus", "n_gpus", "nproc_per_node", "nproc", "world_size", "devices"), _PROCESSES),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint", "ckpt", "ckpt_path", "auto_resume"), _RESUME),
    **dict.fromkeys(
        ("num_workers", "workers", "j"), "did you mean threads? scaling.num_workers is for python -m launch.ray_train"
    ),
    "dry_run": "a flag of python -m distributed.train, not a setting: give --dry-run there",
    **dict.fromkeys(("config", "cfg", "config_file"), "the first argument names the TOML file"),
}  # fmt: skip


@cache
def known() -> frozenset[str]:
    """Return the dotted path of every setting."""
    return frozenset(leaf.path for leaf in leaves())


@cache
def _by_last_name() -> dict[str, str]:
    return {path.rpartition(".")[2]: path for path in sorted(known(), reverse=True)}


@cache
def _sections() -> frozenset[str]:
    return frozenset(path.partition(".")[0] for path in known() if "." in path)


def unknown(path: str) -> str:
    """Return the error message for a setting that does not exist, with the remedy."""
    return f"unknown setting; {hint(path)}"


def hint(path: str) -> str:
    """Return advice for an unknown dotted path: the setting probably meant, or else where all settings are listed."""
    path = path.lower().replace("-", "_")
    if len(path) > 100:
        return "--help lists all of them"
    if meant := _meant(path):
        return f"did you mean {meant}?"
    near = difflib.get_close_matches(path, _ADVICE, n=1, cutoff=0.85)
    return _ADVICE[near[0]] if near else "--help lists all of them"


def _meant(path: str) -> str | None:
    """Match by another tool's name, then by the full path, then by the last name in any section, then by the section."""
    if path in _MEANT or path in _ADVICE:
        return _MEANT.get(path)
    if path in known():
        return path
    last, by_last_name = path.rpartition(".")[2], _by_last_name()
    close = difflib.get_close_matches(path, sorted(known()), n=1, cutoff=0.8)
    if close or last in by_last_name:
        return close[0] if close else by_last_name[last]
    near = difflib.get_close_matches(last, sorted(by_last_name), n=1, cutoff=0.7)
    return _MEANT.get(last) or (by_last_name[near[0]] if near else _near_section(path))


def _near_section(path: str) -> str | None:
    section, dot, _ = path.partition(".")
    if not dot or section in _sections():
        return None
    return next(iter(difflib.get_close_matches(section, _sections(), n=1, cutoff=0.7)), None)
