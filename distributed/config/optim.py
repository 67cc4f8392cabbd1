"""Settings of the optimizers. Imports no torch."""

from typing import Literal

from distributed.config.schema import Section, setting


class _Optim(Section):
    name: str  # defined by the variants; here so that it is the first field
    lr: float = setting(0.1, "learning rate, at lr_base_batch if lr_scaling is set", gt=0, le=100)
    lr_scaling: Literal["none", "linear", "sqrt"] = setting(
        "none", "how lr grows with global_batch_size / lr_base_batch"
    )
    lr_base_batch: int | None = setting(None, "global batch size at which lr applies; only with lr_scaling", gt=0)
    bias_lr_factor: float = setting(
        1.0,
        "learning rate of biases and batch-norm weights as a multiple of lr, or with muon of adamw_lr",
        gt=0,
        le=1e4,
    )
    weight_decay: float  # by the variants too
    decay_norm_and_bias: bool = setting(False, "apply weight_decay to biases and batch-norm weights too")
    max_grad_norm: float | None = setting(None, "clip the gradient to this L2 norm; none: no clipping", gt=0)
    ema_decay: float | None = setting(
        None, "EMA decay of the weights used for evaluation, e.g. 0.999; none: evaluate the raw weights", gt=0, lt=1
    )

    def conflicts(self, *, engine: str) -> list[str]:
        """Return one line per conflict within the section and with `engine.name`."""
        found = []
        if self.decay_norm_and_bias and not self.weight_decay:
            found.append(
                "optim.decay_norm_and_bias has no effect with optim.weight_decay = 0: remove it or set optim.weight_decay"
            )
        if self.lr_scaling == "none" and self.lr_base_batch is not None:
            found.append(
                f"optim.lr_base_batch = {self.lr_base_batch} has no effect with optim.lr_scaling = none: "
                "remove it or set optim.lr_scaling to linear or sqrt"
            )
        if self.lr_scaling != "none" and self.lr_base_batch is None:
            found.append(
                f"optim.lr_scaling = {self.lr_scaling} needs optim.lr_base_batch: set it to the global batch size at which "
                "optim.lr applies"
            )
        return found


class Sgd(_Optim):
    name: Literal["sgd"] = setting("sgd", "SGD with momentum")
    momentum: float = setting(0.9, "momentum; 0: off", ge=0, lt=1)
    nesterov: bool = setting(True, "use Nesterov momentum")
    weight_decay: float = setting(5e-4, "L2 penalty", ge=0, le=1)

    def conflicts(self, *, engine: str) -> list[str]:
        found = super().conflicts(engine=engine)
        if self.nesterov and not self.momentum:
            found.append("optim.nesterov = true needs momentum: set optim.momentum above 0 or optim.nesterov = false")
        return found


class AdamW(_Optim):
    name: Literal["adamw"] = setting("adamw", "Adam with decoupled weight decay")
    lr: float = setting(1e-3, "learning rate, at lr_base_batch if lr_scaling is set", gt=0, le=100)
    beta1: float = setting(0.9, "decay rate of the gradient's moving average", ge=0, lt=1)
    beta2: float = setting(0.999, "decay rate of the squared gradient's moving average", ge=0, lt=1)
    eps: float = setting(1e-8, "term added to the denominator", gt=0)
    weight_decay: float = setting(0.05, "each step subtracts lr * weight_decay * weight", ge=0, le=1)


class Muon(_Optim):
    name: Literal["muon"] = setting(
        "muon", "momentum with orthogonal updates for weights of two or more dimensions, AdamW for biases, batch-norm weights "
        "and the last layer"
    )  # fmt: skip
    lr: float = setting(
        0.05, "learning rate of the orthogonal updates, at lr_base_batch if lr_scaling is set", gt=0, le=100
    )
    momentum: float = setting(0.9, "Nesterov momentum of the orthogonal updates", ge=0, lt=1)
    weight_decay: float = setting(0.1, "each step subtracts lr * weight_decay * weight", ge=0, le=1)
    adamw_lr: float = setting(5e-3, "learning rate of AdamW; follows the schedule in proportion to lr", gt=0, le=100)
    beta1: float = setting(0.9, "AdamW's decay rate of the gradient's moving average", ge=0, lt=1)
    beta2: float = setting(0.99, "AdamW's decay rate of the squared gradient's moving average", ge=0, lt=1)
    eps: float = setting(1e-8, "term added to AdamW's denominator", gt=0)

    def conflicts(self, *, engine: str) -> list[str]:
        found = super().conflicts(engine=engine)
        if engine != "ddp":
            found.append(
                f"optim.name = muon needs entire weights, but engine.name = {engine} shards them: set engine.name = ddp, or "
                "choose another optimizer"
            )
        return found


AnyOptim = Sgd | AdamW | Muon
