"""DeepSpeed's ZeRO: at stages 1 to 3 optimizer tensors, gradients and weights are sharded over the ranks.

DeepSpeed sums the gradients, clips them and updates the weights. Its schedules are not used, since its plateau counts steps in
units of the batch size; nor are its counters for gradient accumulation; nor its checkpoints, since with SGD none of its formats
loads at another world size. Instead, this engine reads and writes tensors where DeepSpeed keeps them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distributed.comm.collectives import world_size
from distributed.config.engines import DeepSpeed
from distributed.config.optim import AdamW, AnyOptim, Sgd
from distributed.data.batch import Batch
from distributed.engine import deepspeed_compat
from distributed.engine.model_state import evaluation_mode
from distributed.engine.prepare import Compute, prepare
from distributed.engine.protocol import Loss, Outcome
from distributed.engine.sharding import LocalTensor, Replicated, load
from distributed.errors import InputError
from distributed.optim.ema import WeightEMA
from distributed.optim.optimizer import initial_state, parameter_groups


class DeepSpeedEngine:
    """An `Engine` over `deepspeed.initialize`. Needs a process group.

    Args:
        model: float32 on the CPU, with its initial weights; the engine takes ownership.

    Raises:
        InputError: a setting needs CUDA.
    """

    def __init__(
        self,
        config: DeepSpeed,
        model: nn.Module,
        *,
        optim: AnyOptim,
        compute: Compute,
        grad_accum_steps: int,
    ) -> None:
        device = compute.device
        for name in ("overlap_comm", "offload_optimizer"):
            if getattr(config, name) and device.type != "cuda":
                raise InputError(
                    f"engine.{name} = true needs CUDA, but the device is {device.type}; remove engine.{name}"
                )
        self.stage = config.zero_stage
        # DeepSpeed flattens parameters in the order of their indices, so they keep no other memory layout.
        self.model = prepare(model, replace(compute, channels_last=False))
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # Stage 3 empties all parameters, frozen ones too. Tied ones have several names in a checkpoint.
        shapes = {name: p.shape for name, p in self.model.named_parameters(remove_duplicate=False)}
        settings = _settings(
            config, self.model, optim=optim, precision=compute.precision, grad_accum_steps=grad_accum_steps
        )
        optimizer = _optimizer(optim, self._parameters)
        self._deepspeed = deepspeed_compat.initialize(self.model, optimizer, settings, device)
        self._model_tensors = self._find_model_tensors(shapes)
        self._optimizer_tensors = self._find_optimizer_tensors(optim, shapes)
        live = {name: tensor.local for name, tensor in self._model_tensors.items()}
        self._ema = WeightEMA(live, decay=optim.ema_decay, trained=self._parameters) if optim.ema_decay else None

    def predict(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._deepspeed(batch.images)
            return logits

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        value, outcome = loss(self._deepspeed, batch)
        # DeepSpeed divides the sum over ranks by world_size, but each rank's loss is already its contribution to the mean.
        self._deepspeed.backward(value * world_size(), scale_wrt_gas=False)
        return outcome

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        for group in deepspeed_compat.base_optimizer(self._deepspeed).param_groups:
            group["lr"] = float(lr) * group["lr_factor"]
        # At stage 0 DeepSpeed computes a norm only if it clips.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = None if self.stage else torch.nn.utils.get_total_norm(gradients)
        self._deepspeed.step()
        if self._ema:
            self._ema.update(step)
        return torch.as_tensor(self._deepspeed.get_global_grad_norm() if norm is None else norm)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with self._ema.in_place() if self._ema else nullcontext(), evaluation_mode(self.model):
            yield
            self._free_gathered_weights()  # not after an error: it waits for gathers under way, and peers may be gone

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, (local, placement) in self.local_tensors().items():
            yield name, placement.gather(local)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._free_gathered_weights()
        load(self.local_tensors(), tensors)
        if self.stage:
            deepspeed_compat.refresh_master_weights(self._deepspeed)

    def local_tensors(self) -> dict[str, LocalTensor]:
        """Return this rank's parts of the tensors that `state` yields, by the same names."""
        tensors = {f"model.{name}": tensor for name, tensor in self._model_tensors.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer_tensors.items()}
        for name, local in self._ema.tensors.items() if self._ema else ():
            tensors[f"ema.{name}"] = LocalTensor(local, self._model_tensors[name].placement)
        return tensors

    def _free_gathered_weights(self) -> None:
        if self.stage == 3:
            deepspeed_compat.free_gathered_weights(self._deepspeed)

    def _find_model_tensors(self, shapes: Mapping[str, torch.Size]) -> dict[str, LocalTensor]:
        """Return the weights and buffers with which the model computes."""
        tensors = {name: LocalTensor(t, Replicated(t.shape)) for name, t in self.model.state_dict().items()}
        if self.stage == 3:
            every = self.model.named_parameters(remove_duplicate=False)
            tensors |= {name: deepspeed_compat.weight_shard(p, shapes[name]) for name, p in every}
        return tensors

    def _find_optimizer_tensors(self, optim: AnyOptim, shapes: Mapping[str, torch.Size]) -> dict[str, LocalTensor]:
        """Return the optimizer's tensors by `PARAMETER.KEY`; sharded ones are views of flat tensors of many parameters."""
        state, tensors = deepspeed_compat.base_optimizer(self._deepspeed).state, dict[str, LocalTensor]()
        for name, parameter in self._parameters.items():
            fragment = deepspeed_compat.fragment(self._deepspeed, parameter, shapes[name], stage=self.stage)
            for key, tensor in state.setdefault(fragment.flat, initial_state(optim, fragment.flat)).items():
                tensors[f"{name}.{key}"] = fragment.local_tensor(tensor)
        return tensors


def _optimizer(config: AnyOptim, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    own = list(parameters.values())
    groups = [
        {"params": group.parameters, "weight_decay": group.weight_decay, "lr_factor": group.lr_factor}
        for group in parameter_groups(config, own, [p.dim() for p in own])
        if group.parameters
    ]
    if isinstance(config, AdamW):
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    assert isinstance(config, Sgd)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def _settings(
    config: DeepSpeed, model: nn.Module, *, optim: AnyOptim, precision: str, grad_accum_steps: int
) -> dict[str, Any]:
    """Return DeepSpeed's own config. DeepSpeed ignores unknown keys, so no user setting is passed on unchecked."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, but only used for DeepSpeed's batch arithmetic
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_settings(config, model),
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step
        # Not its bf16 block, which casts the weights that batch norm's kernels need in float32. With a non-empty
        # list, gradients would be summed in bfloat16.
        "torch_autocast": {
            "enabled": precision == "bfloat16", "dtype": "bfloat16", "lower_precision_safe_modules": [],
        },
    }  # fmt: skip


def _zero_settings(config: DeepSpeed, model: nn.Module) -> dict[str, Any]:
    sizes = [p.numel() for p in model.parameters()]
    # DeepSpeed's defaults of 5e8 elements exceed these models; gradients would only be reduced after the last one is ready.
    bucket = config.bucket_mib * 2**20 // 4 if config.bucket_mib else max(2**18, sum(sizes) // 8 // 2 * 2)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        # Not contiguous: that buffer would keep full gradients of parameters that are split between two ranks.
        zero |= {"reduce_bucket_size": bucket, "overlap_comm": config.overlap_comm, "contiguous_gradients": False}
    if config.zero_stage in (1, 2):
        zero |= {"allgather_bucket_size": bucket}
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            # Free a layer's weights after use, unless they are used again within one bucket.
            "stage3_max_live_parameters": max(sizes) + bucket,
            "stage3_max_reuse_distance": bucket,
            # Shard small parameters too: the shards of unsharded ones are not the tensors with which the model computes.
            "stage3_param_persistence_threshold": 0,
        }
    if config.offload_optimizer:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    return zero
