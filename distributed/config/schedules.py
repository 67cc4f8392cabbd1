"""The settings of what steers the learning rate, and of when a run ends early. Imports no torch."""

from typing import Literal

from distributed.config.schema import Section, setting


class Constant(Section):
    name: Literal["constant"] = setting("constant", "keeps the learning rate")
    warmup_epochs: float = setting(0.0, "epochs over which lr rises linearly from zero", ge=0)


class Cosine(Section):
    name: Literal["cosine"] = setting("cosine", "linear warm-up, then half a cosine down to lr * final_factor")
    warmup_epochs: float = setting(0.0, "epochs over which lr rises linearly from zero", ge=0)
    final_factor: float = setting(0.0, "lr at the end as a part of lr", ge=0, lt=1)


class OneCycle(Section):
    name: Literal["one_cycle"] = setting(
        "one_cycle", "half a cosine up from lr * start_factor to lr, then half a cosine down"
    )
    warmup_fraction: float = setting(0.25, "part of the steps that rises", gt=0, lt=1)
    start_factor: float = setting(0.04, "lr at the first step as a part of lr", ge=0, lt=1)
    final_factor: float = setting(1e-4, "lr at the last step as a part of lr", ge=0, lt=1)


class Plateau(Section):
    name: Literal["plateau"] = setting("plateau", "multiplies lr by factor when validation stops improving")
    metric: Literal["accuracy", "loss"] = setting("accuracy", "validation metric that is watched")
    factor: float = setting(0.1, "what lr is multiplied by at a drop", gt=0, lt=1)
    patience: int = setting(20, "epochs without improvement before a drop", ge=0)
    min_delta: float = setting(0.0, "an improvement must exceed this (accuracy as a fraction of 1)", ge=0)
    cooldown: int = setting(0, "epochs after a drop that do not count as bad", ge=0)
    max_drops: int | None = setting(3, "drops at the most; none: no limit", ge=0)
    restore_best_on_drop: bool = setting(
        False, "at a drop, go back to the best epoch's weights and batch-norm statistics, momentum zero"
    )


class EarlyStopping(Section):
    metric: Literal["accuracy", "loss"] = setting("accuracy", "validation metric that is watched")
    patience: int = setting(100, "end the run after this many epochs without improvement", gt=0)
    min_delta: float = setting(0.0, "an improvement must exceed this (accuracy as a fraction of 1)", ge=0)
