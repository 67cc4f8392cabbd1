"""The process group of a run, the device of its rank and the threads it computes with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from distributed.errors import InputError
from distributed.rendezvous import agree_on_token
from distributed.topology import Topology


def choose_device(asked: str, topology: Topology) -> torch.device:
    """The device of this rank; ranks share a GPU where there are more of them than GPUs.

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device = cuda: no CUDA device is to be seen; use --device cpu, or check nvidia-smi and torch's build"
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", topology.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def make_deterministic(device: torch.device) -> None:
    """Same inputs, same bits, on one kind of device."""
    if device.type == "cuda":
        # Read at the first cuBLAS call. https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


@contextmanager
def process_group(topology: Topology, device: torch.device, *, timeout_seconds: float) -> Iterator[None]:
    """The default process group: NCCL where each rank has its own GPU, else gloo; one made before (by Ray) is used as it
    is. None for a single process that no launcher started.

    It is taken down only after a good end: with peers in an unknown state, leaving is safer than a last collective.
    """
    timeout = timedelta(seconds=timeout_seconds)
    # Of groups made later, by FSDP2 and DeepSpeed too: torch hands the first one's timeout on to none, and they would wait for
    # a lost host for 30 minutes (10 under NCCL).
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)
    if not topology.launched or dist.is_initialized():
        yield
        return
    own_gpu = device.type == "cuda" and topology.local_world_size <= torch.cuda.device_count()
    store, rank, world_size = next(rendezvous("env://", topology.rank, topology.world_size, timeout=timeout))
    token = agree_on_token(store, rank=rank, world_size=world_size, timeout=timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own_gpu else "gloo",
        store=PrefixStore(token, store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if own_gpu else None,
    )
    yield
    dist.destroy_process_group()
