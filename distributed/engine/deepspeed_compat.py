"""Everything this project uses of DeepSpeed beyond its documented interface, as read from DeepSpeed 0.19.8.

`tests/unit/test_deepspeed_compat.py` fails if the installed release no longer has one of these names.
"""

import contextlib
import gc
import logging
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distributed.comm.collectives import rank
from distributed.engine.sharding import FlatShard, LocalTensor, Placement, Replicated


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device
) -> Any:
    """Call `deepspeed.initialize` without its output, and return DeepSpeed's engine."""
    # Read when deepspeed is imported; if it is not set, every rank logs which accelerator it detected.
    os.environ["DS_ACCELERATOR"] = device.type
    with contextlib.redirect_stdout(None):
        import deepspeed

        own_logger = logging.getLogger("DeepSpeed")
        own_logger.handlers.clear()
        own_logger.propagate = True
        # SGD is an "untested optimizer" to DeepSpeed.
        own_logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
        # An all-reduce for inference, which DeepSpeed would compile behind a lock that a killed process never releases.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed uses names of collectives that torch 2.14 has deprecated.
        renamed = r".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated"
        warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
        # DeepSpeed probes for optional imports. If an earlier engine, whose finalizer imports too, were collected meanwhile,
        # that would raise a KeyError (https://github.com/python/cpython/issues/106176); so collect it now.
        gc.collect()
        if device.type == "cuda":
            # DeepSpeed takes LOCAL_RANK for the index of its GPU, in stage 3 during training too; a rank may see only its own.
            accelerator = deepspeed.accelerator.get_accelerator()
            accelerator.device_name = lambda index=None: "cuda" if index is None else str(device)
            accelerator.set_device = lambda _: torch.cuda.set_device(device)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def base_optimizer(engine: Any) -> Any:
    """Return the torch optimizer inside DeepSpeed's optimizer."""
    return engine.basic_optimizer


def free_gathered_weights(engine: Any) -> None:
    """Free all weights that stage 3 has gathered, because the shards they came from are about to change."""
    engine.empty_partition_cache()


def refresh_master_weights(engine: Any) -> None:
    """Copy the model's weights to the float32 copies that the optimizer updates at stages 1 to 3."""
    engine.optimizer.refresh_fp32_params()


def weight_shard(parameter: Any, shape: torch.Size) -> LocalTensor:
    """Return this rank's part of a parameter at stage 3."""
    padded = parameter.ds_tensor.detach()
    shard = _padded_shard(padded.numel(), shape)
    return LocalTensor(padded.view(-1)[: shard.length], shard)


class Fragment(NamedTuple):
    """Where this rank's elements of a parameter are inside the tensor that the optimizer updates for it."""

    flat: Tensor
    """The parameter itself without sharding, else a flat tensor shared by many parameters."""
    elements: slice | None
    """Elements of `flat`; None for all of them, unflattened."""
    placement: Placement
    """Which elements of the parameter those are."""

    def local_tensor(self, state: Tensor) -> LocalTensor:
        """Return this parameter's part of an optimizer tensor, which is a scalar or has the shape of `flat`."""
        if not state.dim():
            return LocalTensor(state, Replicated(state.shape))
        return LocalTensor(state if self.elements is None else state[self.elements], self.placement)


def fragment(engine: Any, parameter: Any, shape: torch.Size, *, stage: int) -> Fragment:
    """Locate a parameter of this shape in the optimizer's tensors.

    Args:
        stage: of ZeRO, 0 to 3.
    """
    zero = engine.optimizer
    if stage == 0:
        return Fragment(parameter, None, Replicated(shape))
    if stage == 3:
        group, offset, padded_length = zero.grad_position[zero.get_param_id(parameter)]
        shard = _padded_shard(padded_length, shape)
        return Fragment(zero.fp32_partitioned_groups_flat[group], slice(offset, offset + shard.length), shard)
    group = next(i for i, own in enumerate(zero.bit16_groups) if any(p is parameter for p in own))
    flat, mapping = zero.single_partition_of_fp32_groups[group], parameter._hp_mapping
    if mapping is None:  # other ranks have all of its elements
        return Fragment(flat, slice(0, 0), FlatShard(shape, 0, 0))
    in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    elements = slice(in_flat.start, in_flat.start + in_flat.numel)
    return Fragment(flat, elements, FlatShard(shape, in_parameter.start, in_parameter.numel))


def _padded_shard(padded_length: int, shape: torch.Size) -> FlatShard:
    """Return this rank's shard at stage 3: one of `world_size` equal ranges, without padding past the end of the tensor."""
    start = min(rank() * padded_length, shape.numel())
    return FlatShard(shape, start, min(padded_length, shape.numel() - start))
