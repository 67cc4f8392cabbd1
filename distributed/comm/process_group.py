"""The default process group of a run and the device of each rank."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from distributed.comm import torch_compat
from distributed.comm.peers import Peers
from distributed.comm.torch_compat import Store
from distributed.errors import InputError
from distributed.host.identity import boot_id
from distributed.topology import Topology

_OPEN_FILES = 65_536


def choose_device(name: str, topology: Topology) -> torch.device:
    """Return this rank's device: "cpu", "cuda", or for "auto" a GPU if one is available.

    If a node has more ranks than GPUs, ranks share them.

    Raises:
        InputError: `name` is "cuda" and no GPU is available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device = cuda: no CUDA device found; use --device cpu, or check nvidia-smi and torch's build")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", topology.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(topology: Topology, device: torch.device, *, timeout_seconds: float) -> Iterator[None]:
    """Context manager for the default process group: NCCL if each rank has its own GPU, otherwise gloo.

    An existing group (Ray's) is used, with this timeout. A single process without a launcher gets no group. The group is
    destroyed only on success: after an error, with peers in an unknown state, a last collective might hang.

    Raises:
        InputError: the ranks cannot rendezvous at MASTER_ADDR and MASTER_PORT, or an existing group has no CPU backend.
        PeerError: another rank did not arrive, was lost or has failed.
    """
    timeout = timedelta(seconds=timeout_seconds)
    torch_compat.set_default_timeout(timeout)
    if not topology.launched or dist.is_initialized():
        if dist.is_initialized():
            _check_cpu_backend()
            _set_nccl_timeout(device, timeout)
        yield
        return
    _raise_open_files()
    rank, world_size = topology.rank, topology.world_size
    with Peers.connect(topology, timeout_seconds=timeout_seconds) as peers:
        own_gpu = each_rank_has_a_gpu(peers.store, gpu_id(device), rank=rank, world_size=world_size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_gpu else "gloo",
            store=peers.store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if own_gpu else None,
        )
        _set_nccl_timeout(device, timeout)
        # Without this, a rank that exits early closes its connections while another is still opening them.
        dist.all_reduce(torch.zeros(1))
        yield
        dist.destroy_process_group()


def gpu_id(device: torch.device) -> str:
    """Return a name that distinguishes this GPU from all others; empty for a CPU."""
    # Not the index: a rank may see a single GPU, whose index is 0 for every rank.
    return f"{boot_id()} {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def each_rank_has_a_gpu(store: Store, gpu: str, *, rank: int, world_size: int) -> bool:
    """Whether no two ranks share a GPU, as NCCL requires. All ranks return the same answer.

    Args:
        gpu: the `gpu_id` of this rank.

    Raises:
        InputError: some ranks have a GPU and others have none.
    """
    store.set(f"gpu/{rank}", gpu)
    gpus = [found.decode() for found in store.multi_get([f"gpu/{r}" for r in range(world_size)])]
    without = [str(r) for r, found in enumerate(gpus) if not found]
    if without and any(gpus):
        raise InputError(
            f"device: rank {', '.join(without)} has no CUDA device, but other ranks have one: use --device cpu for all, or "
            "check nvidia-smi on their nodes"
        )
    return all(gpus) and len(set(gpus)) == world_size


def check_own_gpu(device: torch.device, needed_by: str) -> None:
    """Raise InputError if ranks share a GPU, so that the process group has no NCCL."""
    if device.type == "cuda" and not _uses_nccl(device):
        raise InputError(
            f"{needed_by} needs one GPU per process, but processes share a GPU: start one process per GPU, or "
            "use --engine.name ddp"
        )


def _uses_nccl(device: torch.device) -> bool:
    return device.type == "cuda" and torch_compat.has_nccl()


def _set_nccl_timeout(device: torch.device, timeout: timedelta) -> None:
    """Set NCCL's timeout, because nothing else, e.g. a signal, ends a thread that waits for the GPU."""
    if _uses_nccl(device):
        torch_compat.set_nccl_timeout(device, timeout)


def _check_cpu_backend() -> None:
    """Raise InputError if the existing group has none: waits for a save, for example, are collectives on the host."""
    if "cpu:" not in str(dist.get_backend_config()):
        raise InputError(
            "process group: the existing one has no backend for CPU tensors: create it with "
            'init_process_group("cpu:gloo,cuda:nccl"), or let train() create it'
        )


def _raise_open_files() -> None:
    """Raise the limit of open files: gloo opens one per peer and group, and many systems allow 1,024 at first.

    Not as far as allowed, since some programs loop over all possible ones.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
