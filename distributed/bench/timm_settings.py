"""The settings of a config as arguments of timm's functions, and what timm cannot express. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from distributed.bench.options import IMAGES
from distributed.config import TrainConfig
from distributed.config.data import AnyData, CifarData, GeneratedData
from distributed.config.functions import Loss
from distributed.config.models import BuiltInModel
from distributed.data.sources.registry import class_names
from distributed.errors import InputError

Values = Mapping[str, Any]
"""A section of a config by setting."""
_ALL_OPTIMIZERS = {
    "name", "lr", "lr_scaling", "lr_base_batch", "bias_lr_factor", "decay_norm_and_bias", "weight_decay", "max_grad_norm",
    "ema_decay",
}  # fmt: skip
_OPTIMIZERS = {
    "sgd": {"momentum", "nesterov"},
    "adamw": {"beta1", "beta2", "eps"},
    "muon": {"momentum", "adamw_lr", "beta1", "beta2", "eps"},
}
"""The optimizers that timm has too, with the settings that only they have."""
_SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"sched": "constant"},
    "cosine": {"sched": "cosine"},
    "linear": {"sched": "poly", "decay_rate": 1.0},
    "one_cycle": {"sched": "cosine"},
}
"""The schedules that timm has too. `decay_rate` is the exponent of poly."""
_NEWTON_SCHULZ = {"ns_steps": 3, "ns_coefficients": "original", "adjust_lr_fn": "original", "conv_mode": "flatten"}
"""Muon's iteration as in `distributed/optim/muon.py`; timm's defaults are others."""

_REFUSED = "has no counterpart on timm's side of this benchmark; change it, or measure this project alone: --no-peers"


def optimizer_arguments(optim: Values) -> dict[str, Any]:
    """Return arguments of timm's `create_optimizer_v2` for an `optim` section, except for its groups and learning rate.

    Raises:
        InputError: timm does not have this optimizer.
    """
    betas = (optim.get("beta1"), optim.get("beta2"))
    match optim["name"]:
        case "sgd":  # in timm, `sgd` is with Nesterov momentum
            return {"opt": "sgd" if optim["nesterov"] else "momentum", "momentum": optim["momentum"]}
        case "adamw":
            return {"opt": "adamw", "betas": betas, "eps": optim["eps"]}
        case "muon":
            return {"opt": "muon", "momentum": optim["momentum"], "betas": betas, **_NEWTON_SCHULZ}
    raise InputError(f"optim.name = {optim['name']}: {_REFUSED}")


def parameter_groups(optim: Values, dims: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the groups of timm's optimizer, with the names of the parameters as `params`.

    timm's schedulers multiply the learning rate of a group by its `lr_scale`.

    Args:
        dims: number of dimensions of each trained parameter by name, in the order of the model.
    """
    weights = [name for name, dimensions in dims.items() if dimensions > 1]
    others = {
        "params": [name for name, dimensions in dims.items() if dimensions <= 1],
        "weight_decay": optim["weight_decay"] if optim["decay_norm_and_bias"] else 0.0,
        "lr_scale": optim.get("bias_lr_factor", 1.0),
    }
    decayed = {"weight_decay": optim["weight_decay"]}
    if optim["name"] != "muon":
        groups = [{"params": weights, **decayed}, others]
    else:
        # timm's fallback is AdamW in a group without Nesterov momentum, and NAdamW in one with it.
        fallback = {"use_fallback": True, "nesterov": False, "eps": optim["eps"]}
        factor = optim["adamw_lr"] / optim["lr"]
        groups = [
            {"params": weights[:-1], **decayed, "use_muon": True, "nesterov": True},
            {"params": weights[-1:], **decayed, **fallback, "lr_scale": factor},
            others | fallback | {"lr_scale": others["lr_scale"] * factor},
        ]
    return [group for group in groups if group["params"]]


def schedule_arguments(config: TrainConfig, steps_per_epoch: int) -> dict[str, Any]:
    """Return arguments of timm's `create_scheduler_v2`, which updates after every step."""
    section, peak = config.schedule.model_dump(), config.peak_lr
    warmup = section.get("warmup_epochs", section.get("warmup_fraction", 0.0) * config.epochs)
    steps = {"step_on_epochs": False, "updates_per_epoch": steps_per_epoch}
    first = peak * section.get("start_factor", 1 / max(1, warmup * steps_per_epoch))
    warmups = {"warmup_epochs": warmup, "warmup_lr": first, "warmup_prefix": True}
    found = _SCHEDULES[section["name"]] | warmups | steps
    if section["name"] == "constant":
        return found | {"num_epochs": config.epochs}
    return found | {"num_epochs": config.epochs - warmup, "min_lr": peak * section["final_factor"]}


def check(config: TrainConfig) -> None:
    """Raise InputError, with a line for each setting that this benchmark cannot give to timm."""
    if wrong := _inexpressible(config):
        raise InputError(*[f"{setting}: {_REFUSED}" for setting in wrong])


def _inexpressible(config: TrainConfig) -> list[str]:
    optim, augment = config.optim.model_dump(), config.data.augment
    found = {
        f"data.name = {config.data.name}": not isinstance(config.data, CifarData | GeneratedData),
        f"model.name = {config.model.name}": not isinstance(config.model, BuiltInModel),
        f"loss.name = {config.loss.name}": not isinstance(config.loss, Loss),
        f"optim.name = {optim['name']}": optim["name"] not in _OPTIMIZERS,
        f"schedule.name = {config.schedule.name}": config.schedule.name not in _SCHEDULES,
        f"precision = {config.precision}": config.precision not in ("bfloat16", "float32"),
        f"grad_accum_steps = {config.grad_accum_steps}": config.grad_accum_steps != 1,
        f"init_from = {config.init_from}": config.init_from is not None,
        "compile = true": config.compile,
        "grad_checkpointing.enabled = true": config.grad_checkpointing.enabled,
        "early_stopping": config.early_stopping is not None,
    }
    found |= {
        f"data.augment.{name} = {value}": bool(value)
        for name in ("mixup", "cutmix", "cutout", "low_res_epochs", "function")
        if (value := getattr(augment, name))
    }
    known = _ALL_OPTIMIZERS | _OPTIMIZERS.get(optim["name"], optim.keys())
    found |= {f"optim.{name} = {value}": name not in known for name, value in optim.items()}
    return [setting for setting, is_wrong in found.items() if is_wrong]


def _training_images(data: AnyData) -> int:
    """Return the number of images to train on. All classes are equally large, but for one image."""
    assert isinstance(data, CifarData | GeneratedData)
    images, classes = getattr(data, "train_samples", IMAGES), len(class_names(data))
    sizes = [len(range(label, images, classes)) for label in range(classes)]
    return sum(size - round(size * data.validation_fraction) for size in sizes)


def differences(config: TrainConfig) -> list[str]:
    """Return what timm's side does otherwise, because timm cannot express it, one sentence each."""
    evaluation = config.evaluation
    found = {
        "No exact mode: timm's bits depend on the number of processes.": True,
        "Flips are random: timm has no alternating flip.": config.data.augment.flip == "alternating",
        "timm has no views of mirrored or shifted test images: both sides average over this project's.": bool(
            evaluation.flip_tta or evaluation.shift_tta
        ),
        "timm's Muon always computes its updates in bfloat16, slowly on a processor without instructions for it.": (
            config.optim.name == "muon" and config.precision == "float32"
        ),
        "The learning rate rises linearly, not as half a cosine.": config.schedule.name == "one_cycle",
        "Incomplete last batches of an epoch are dropped, as by timm's loader.": (
            _training_images(config.data) % config.global_batch_size != 0
        ),
    }
    return [sentence for sentence, applies in found.items() if applies]
