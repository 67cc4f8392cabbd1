"""DeepSpeed's ZeRO: at a stage of 0 to 3 the optimizer, gradients and weights are shared out over the ranks.

The only module that imports deepspeed. Its engine sums the gradients, clips and updates; what it is not asked for is
schedules (its own steps a plateau by the batch size), accumulation by its counters, and checkpoints (of its own
formats none loads at another number of ranks with SGD): tensors are read and written where they lie.
"""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distributed.comm.all_gather import open_all_gather
from distributed.comm.collectives import rank, world_size
from distributed.config.engines import DeepSpeed
from distributed.config.sections import AdamW, Sgd
from distributed.data.batch import Batch
from distributed.engine.model_state import cast
from distributed.engine.protocol import Loss, Outcome
from distributed.engine.sharding import FlatShard, LocalTensor, Replicated, load
from distributed.errors import InputError
from distributed.models.fused_batch_norm import synchronize_batch_norm
from distributed.optim.optimizer import WeightEMA, decay_groups, first_state


class DeepSpeedEngine:
    """An `Engine` over `deepspeed.initialize`.

    Args:
        model: float32 on the CPU, with its initial weights; taken over.

    Needs a process group.

    Raises:
        InputError: a setting needs CUDA.
    """

    def __init__(
        self,
        config: DeepSpeed,
        model: nn.Module,
        *,
        optim: Sgd | AdamW,
        precision: str,
        channels_last: bool,
        device: torch.device,
        grad_accum_steps: int,
        timeout_seconds: float,
    ) -> None:
        for name in ("overlap_comm", "offload_optimizer"):
            if getattr(config, name) and device.type != "cuda":
                raise InputError(f"engine.{name} = true needs CUDA, and the device is {device.type}: leave {name} out")
        self.stage = config.zero_stage
        # DeepSpeed flattens parameters in the order of their indices, so they keep no other layout.
        self.model = cast(model, precision=precision, channels_last=False, device=device)
        if world_size() > 1:
            self.model = synchronize_batch_norm(self.model, open_all_gather(device, timeout_seconds=timeout_seconds))
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        shapes = {name: p.shape for name, p in self._parameters.items()}  # at stage 3 parameters lose theirs
        settings = _settings(config, self.model, optim=optim, precision=precision, grad_accum_steps=grad_accum_steps)
        self._deepspeed = _initialize(self.model, _optimizer(optim, self._parameters), settings, device)
        self._own = self._weights(shapes)
        self._kept = self._optimizer_state(optim, shapes)
        live = {name: held.part for name, held in self._own.items()}
        self._average = WeightEMA(live, decay=optim.ema_decay) if optim.ema_decay else None

    def predict(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._deepspeed(batch.images, batch.sample_keys)
            return logits

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        value, outcome = loss(self._deepspeed, batch)
        # It divides the sum over ranks by their number; each rank's loss is its part of the mean already.
        self._deepspeed.backward(value * world_size(), scale_wrt_gas=False)
        return outcome

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        for group in self._deepspeed.basic_optimizer.param_groups:
            group["lr"] = float(lr)
        # Without sharding DeepSpeed has a norm only where it clips.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        whole = None if self.stage else torch.nn.utils.get_total_norm(gradients)
        self._deepspeed.step()
        if self._average:
            self._average.update(step)
        return torch.as_tensor(self._deepspeed.get_global_grad_norm() if whole is None else whole)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._deepspeed.eval()
        with self._average.in_place() if self._average else nullcontext():
            yield
            self._free()
        self._deepspeed.train()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, (part, place) in self._held().items():
            yield name, place.whole(part)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._free()
        load(self._held(), tensors)
        if self.stage:  # the weights that are updated are copies of those that compute
            self._deepspeed.optimizer.refresh_fp32_params()

    def _free(self) -> None:
        """Let nothing that was gathered be used any more: its parts are about to change."""
        if self.stage == 3:
            self._deepspeed.empty_partition_cache()

    def _held(self) -> dict[str, LocalTensor]:
        found = {f"model.{name}": held for name, held in self._own.items()}
        found |= {f"optimizer.{name}": held for name, held in self._kept.items()}
        averages = self._average.tensors if self._average else {}
        return found | {f"ema.{name}": LocalTensor(part, self._own[name].place) for name, part in averages.items()}

    def _weights(self, shapes: Mapping[str, torch.Size]) -> dict[str, LocalTensor]:
        """What the model computes with."""
        found = {
            name: LocalTensor(tensor, Replicated(tensor.shape)) for name, tensor in self.model.state_dict().items()
        }
        if self.stage == 3:
            parameters: dict[str, Any] = self._parameters
            found |= {name: _own_run(p.ds_tensor.detach(), shapes[name]) for name, p in parameters.items()}
        return found

    def _optimizer_state(self, config: Sgd | AdamW, shapes: Mapping[str, torch.Size]) -> dict[str, LocalTensor]:
        """What the optimizer keeps, by `PARAMETER.KEY`: runs of flat tensors that many parameters share."""
        optimizer, found = self._deepspeed.basic_optimizer, dict[str, LocalTensor]()
        for name, parameter in self._parameters.items():
            flat, piece = self._piece(parameter, shapes[name])
            for key, tensor in optimizer.state.setdefault(flat, first_state(config, flat)).items():
                found[f"{name}.{key}"] = (
                    piece(tensor) if tensor.dim() else LocalTensor(tensor, Replicated(tensor.shape))
                )
        return found

    def _piece(self, parameter: Any, shape: torch.Size) -> tuple[Tensor, Any]:
        """(the tensor that the optimizer updates for this parameter, how this parameter's part is found in such a one)"""
        zero = self._deepspeed.optimizer
        if not self.stage:
            return parameter, lambda tensor: LocalTensor(tensor, Replicated(shape))
        if self.stage == 3:
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            return zero.fp32_partitioned_groups_flat[group], lambda flat: _own_run(
                flat[offset : offset + length], shape
            )
        group = next(i for i, own in enumerate(zero.bit16_groups) if any(p is parameter for p in own))
        flat, mapping = zero.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:  # all of it is other ranks'
            return flat, lambda tensor: LocalTensor(tensor[:0], FlatShard(shape, 0, 0))
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        place = FlatShard(shape, here.start, here.numel)
        return flat, lambda tensor: LocalTensor(tensor[there.start : there.start + there.numel], place)


def _own_run(padded: Tensor, shape: torch.Size) -> LocalTensor:
    """Of as many equal runs as there are ranks; what of them goes over the end is no part of the tensor."""
    start = min(rank() * padded.numel(), shape.numel())
    length = min(padded.numel(), shape.numel() - start)
    return LocalTensor(padded.view(-1)[:length], FlatShard(shape, start, length))


def _optimizer(config: Sgd | AdamW, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    own = list(parameters.values())
    groups = [
        {"params": members, "weight_decay": weight_decay}
        for members, weight_decay in decay_groups(config, own, [p.dim() for p in own])
        if members
    ]
    if isinstance(config, AdamW):
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def _settings(
    config: DeepSpeed, model: nn.Module, *, optim: Sgd | AdamW, precision: str, grad_accum_steps: int
) -> dict[str, Any]:
    """DeepSpeed's own config. It ignores keys that it does not know, so nothing of the user's goes in unchecked."""
    sizes = [p.numel() for p in model.parameters()]
    # Its defaults of 5e8 are larger than these models, whose gradients would then all be held until the last has come.
    bucket = config.bucket_mib * 2**20 // 4 if config.bucket_mib else max(2**18, sum(sizes) // 8 // 2 * 2)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        # Not contiguous: the buffer would hold gradients whole that cross the border between two ranks' parts.
        zero |= {"reduce_bucket_size": bucket, "overlap_comm": config.overlap_comm, "contiguous_gradients": False}
    if config.zero_stage in (1, 2):
        zero |= {"allgather_bucket_size": bucket}
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            # A layer's weights are freed after use, unless they are used again within a bucket's time.
            "stage3_max_live_parameters": max(sizes) + bucket,
            "stage3_max_reuse_distance": bucket,
            # No small parameter stays whole: where it does, its parts are not what the model computes with.
            "stage3_param_persistence_threshold": 0,
        }
    if config.offload_optimizer:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    return {
        "train_micro_batch_size_per_gpu": 1,  # of its own arithmetic, which is not used
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # Not its bf16 block, which casts the weights that batch norm's kernels want in float32. Without the empty list
        # gradients would be summed in bfloat16.
        "torch_autocast": {
            "enabled": precision == "bfloat16", "dtype": "bfloat16", "lower_precision_safe_modules": [],
        },
    }  # fmt: skip


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device
) -> Any:
    # Read when deepspeed is imported, which says on every rank what it found where nothing is set.
    os.environ["DS_ACCELERATOR"] = device.type
    with contextlib.redirect_stdout(None):
        import deepspeed

        own = logging.getLogger("DeepSpeed")
        own.handlers.clear()
        own.propagate = True
        own.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # which SGD is
        # An all-reduce for inference that it would compile, behind a lock which a killed process leaves for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Its name for a collective is older than torch 2.14's.
        warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated", category=FutureWarning)
        # It tries imports, in which the end of an earlier engine, which imports too, would raise a KeyError
        # (https://github.com/python/cpython/issues/106176); so that one ends now.
        gc.collect()
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine
