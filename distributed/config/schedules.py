"""Settings of the learning-rate schedules and of early stopping. Imports no torch."""

from typing import Literal

from distributed.config.schema import Section, setting


class _Schedule(Section):
    def conflicts(self, *, epochs: int) -> list[str]:
        """Return one line per conflict with `epochs`."""
        return []


class _WithWarmup(_Schedule):
    name: str
    warmup_epochs: float = setting(0.0, "epochs over which lr rises linearly from zero", ge=0)

    def conflicts(self, *, epochs: int) -> list[str]:
        if self.warmup_epochs < epochs:
            return []
        return [f"schedule.warmup_epochs = {self.warmup_epochs} must be less than epochs = {epochs}: lower it"]


class Constant(_WithWarmup):
    name: Literal["constant"] = setting("constant", "constant learning rate")


class Cosine(_WithWarmup):
    name: Literal["cosine"] = setting("cosine", "linear warm-up, then half a cosine down to lr * final_factor")
    final_factor: float = setting(0.0, "lr at the end as a fraction of lr", ge=0, lt=1)


class Linear(_WithWarmup):
    name: Literal["linear"] = setting("linear", "linear warm-up, then linear decay to lr * final_factor")
    final_factor: float = setting(0.0, "lr after the last step as a fraction of lr", ge=0, lt=1)


class OneCycle(_Schedule):
    name: Literal["one_cycle"] = setting(
        "one_cycle", "half a cosine up from lr * start_factor to lr, then half a cosine down to lr * final_factor"
    )
    warmup_fraction: float = setting(0.25, "fraction of the steps in which lr rises", gt=0, lt=1)
    start_factor: float = setting(0.04, "lr at the first step as a fraction of lr", ge=0, lt=1)
    final_factor: float = setting(1e-4, "lr at the last step as a fraction of lr", ge=0, lt=1)


class Plateau(_Schedule):
    name: Literal["plateau"] = setting("plateau", "multiply lr by factor when validation stops improving")
    metric: Literal["accuracy", "loss"] = setting("accuracy", "validation metric to monitor")
    factor: float = setting(0.1, "multiplier of lr at each drop", gt=0, lt=1)
    patience: int = setting(20, "epochs without improvement before the one that lowers lr, as in torch", ge=0)
    min_delta: float = setting(0.0, "an improvement must exceed this (accuracy as a fraction of 1)", ge=0)
    cooldown: int = setting(0, "epochs after a drop that do not count towards patience", ge=0)
    max_drops: int | None = setting(3, "maximum number of drops; none: no limit", ge=0)
    restore_best_on_drop: bool = setting(
        False, "at a drop, restore the best epoch's weights and batch-norm statistics and reset the momentum"
    )


class EarlyStopping(Section):
    metric: Literal["accuracy", "loss"] = setting("accuracy", "validation metric to monitor")
    patience: int = setting(100, "end the run after this many epochs without improvement", gt=0)
    min_delta: float = setting(0.0, "an improvement must exceed this (accuracy as a fraction of 1)", ge=0)
