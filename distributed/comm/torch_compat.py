"""All undocumented parts of torch.distributed that this package depends on, as read from torch 2.14.1.

tests/unit/test_torch_compat.py fails if another version of torch lacks one of them.
"""

import pickle
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed does not export them for mypy
from torch.distributed import distributed_c10d

__all__ = [
    "TCP_STORE_MAGIC", "TCP_STORE_PING", "TCP_STORE_VALIDATE", "PrefixStore", "Store", "TCPStore", "all_gather_single",
    "c10d_endpoint", "has_nccl", "publish_worker_address", "rendezvous_round", "set_default_timeout", "set_nccl_timeout",
]  # fmt: skip

# Wire protocol of TCPStore (torch/csrc/distributed/c10d/TCPStoreBackend.hpp): two query types and the magic number.
TCP_STORE_VALIDATE, TCP_STORE_MAGIC, TCP_STORE_PING = 0, 0x3C85F7CE, 13


def all_gather_single(received: Tensor, sent: Tensor) -> None:
    """Fill the flat `received` with the tensors of all ranks, in rank order."""
    # torch 2.14 renamed all_gather_into_tensor, and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent)


def set_default_timeout(timeout: timedelta) -> None:
    """Set the timeout of process groups created later, e.g. by FSDP2 and DeepSpeed.

    torch does not pass the timeout of the default group on to them. They would wait 30 minutes for a lost host, under
    NCCL 10 minutes.
    """
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)


def set_nccl_timeout(device: torch.device, timeout: timedelta) -> None:
    """Set the timeout of the default group's NCCL backend, after the group was created."""
    nccl = dist.group.WORLD._get_backend(device)  # type: ignore[union-attr]
    nccl._set_default_timeout(timeout)


def has_nccl() -> bool:
    """Whether the default process group has an NCCL backend."""
    return "nccl" in str(dist.get_backend_config())


def c10d_endpoint(arguments: list[str]) -> tuple[str, int] | None:
    """Return host and port of the store where torchrun's agents rendezvous, from torchrun's command line arguments.

    None if the agents share no TCPStore, or if the arguments cannot be parsed, e.g. in another version of torch.
    """
    try:
        from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config, parse_rendezvous_endpoint
        from torch.distributed.run import parse_args

        options = parse_args(arguments)  # type: ignore[no-untyped-call]
        store_type = _parse_rendezvous_config(options.rdzv_conf).get("store_type", "tcp")
        host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, default_port=29400)
    except (SystemExit, Exception):
        return None
    is_single_node = options.standalone or str(options.nnodes).rpartition(":")[2] == "1" or not port
    return None if is_single_node or options.rdzv_backend != "c10d" or store_type != "tcp" else (host, port)


def rendezvous_round(store: Store, run_id: str, *, agent_pid: int, node_rank: int) -> int | None:
    """Return the rendezvous round in which this agent has this node rank; None if it takes part in none."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

    found = C10dRendezvousBackend(store, run_id).get_state()
    if not found:
        return None
    state = pickle.loads(found[0])  # the agents read it the same way
    is_ours = any(node.pid == agent_pid and rank == node_rank for node, rank in state.participants.items())
    return int(state.round) if is_ours else None


def publish_worker_address(store: Store, run_id: str, round_number: int, *, host: str, port: int) -> None:
    """Publish MASTER_ADDR and MASTER_PORT for a round, unless they are published already."""
    keys = PrefixStore(f"torch.rendezvous.{run_id}.{round_number}", store)
    keys.compare_set("MASTER_ADDR", "", host)
    keys.compare_set("MASTER_PORT", "", str(port))
