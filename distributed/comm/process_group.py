"""The process group of a run, the device of its rank and the threads it computes with."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d

from distributed.comm.peers import Peers
from distributed.errors import InputError
from distributed.topology import Topology, machine

_NCCL_SECONDS = 120.0
"""How long a collective on the GPU waits for a peer. Longer waits, e.g. for a save, use host collectives."""


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


@contextmanager
def process_group(topology: Topology, device: torch.device, *, timeout_seconds: float) -> Iterator[None]:
    """The default process group: NCCL where each rank has its own GPU, else gloo; one made before (by Ray) is used as it
    is. None for a single process that no launcher started.

    It is taken down only after a good end: with peers in an unknown state, leaving is safer than a last collective.

    Raises:
        InputError: the ranks cannot meet at MASTER_ADDR and MASTER_PORT.
        PeerError: a rank did not come, was lost or has failed.
    """
    timeout = timedelta(seconds=timeout_seconds)
    # Of groups made later, by FSDP2 and DeepSpeed too: torch hands the first one's timeout on to none, and they would wait for
    # a lost host for 30 minutes (10 under NCCL).
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)
    if not topology.launched or dist.is_initialized():
        if dist.is_initialized() and _has_nccl(device):
            _shorten_nccl_timeout(device, timeout)
        yield
        return
    rank, world_size = topology.rank, topology.world_size
    with Peers.meet(topology, timeout_seconds=timeout_seconds) as peers:
        own_gpu = have_own_gpu(peers.store, gpu_of(device), rank=rank, world_size=world_size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_gpu else "gloo",
            store=peers.store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if own_gpu else None,
        )
        if own_gpu:
            _shorten_nccl_timeout(device, timeout)
        # A rank that leaves at once would close its connections while another is still making them.
        dist.all_reduce(torch.zeros(1))
        yield
        dist.destroy_process_group()


def gpu_of(device: torch.device) -> str:
    """A name of the GPU that no other one has; empty for a CPU."""
    # A rank may see only its own GPU, and calls it 0 as every other rank does its own.
    return f"{machine()} {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def have_own_gpu(store: Store, own: str, *, rank: int, world_size: int) -> bool:
    """Whether each rank has a GPU to itself, which NCCL needs; the same answer on all ranks.

    Args:
        own: this rank's GPU, empty if it computes on the CPU.

    Raises:
        InputError: some ranks have a GPU and some have none.
    """
    store.set(f"gpu/{rank}", own)
    gpus = [store.get(f"gpu/{r}").decode() for r in range(world_size)]
    without = [str(r) for r, gpu in enumerate(gpus) if not gpu]
    if without and any(gpus):
        raise InputError(
            f"device: rank {', '.join(without)} has no CUDA device, but other ranks have one: use --device cpu for all, or "
            "check nvidia-smi on their nodes"
        )
    return all(gpus) and len(set(gpus)) == world_size


def check_own_gpu(device: torch.device, wanted_by: str) -> None:
    """Raises InputError if ranks share a GPU and the process group therefore has no NCCL."""
    if device.type == "cuda" and not _has_nccl(device):
        raise InputError(
            f"{wanted_by} needs one GPU per process, but processes share a GPU: start one process per GPU, or "
            "use --engine.name ddp"
        )


def _has_nccl(device: torch.device) -> bool:
    return device.type == "cuda" and "nccl" in str(dist.get_backend_config())


def _shorten_nccl_timeout(device: torch.device, timeout: timedelta) -> None:
    """A host thread that waits for the GPU hears neither a lost peer nor a signal; only this timeout ends it."""
    nccl = dist.group.WORLD._get_backend(device)  # type: ignore[union-attr]
    nccl._set_default_timeout(min(timeout, timedelta(seconds=_NCCL_SECONDS)))
