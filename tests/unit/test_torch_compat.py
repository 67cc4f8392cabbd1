"""Every private name of torch that torch_compat.py relies on exists in the installed version."""

import importlib
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import HashStore, distributed_c10d

from distributed.comm import torch_compat

NAMES = [
    "torch.distributed.distributed_c10d:default_pg_timeout",
    "torch.distributed.distributed_c10d:default_pg_nccl_timeout",
    "torch.distributed:ProcessGroup._get_backend",
    "torch.distributed:get_backend_config",
    "torch.distributed.run:parse_args",
    "torch.distributed.elastic.rendezvous.utils:_parse_rendezvous_config",
    "torch.distributed.elastic.rendezvous.utils:parse_rendezvous_endpoint",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend:C10dRendezvousBackend.get_state",
]


@pytest.mark.parametrize("name", NAMES)
def test_private_name_exists(name: str) -> None:
    module, _, attributes = name.partition(":")
    found = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)


def test_all_gather_single_exists_under_one_of_its_names() -> None:
    assert hasattr(dist, "all_gather_single") or hasattr(dist, "all_gather_into_tensor")


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this build of torch has no NCCL")
def test_nccl_backend_has_a_default_timeout() -> None:
    assert hasattr(dist.ProcessGroupNCCL, "_set_default_timeout")


def test_rendezvous_state_has_round_and_participants() -> None:
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

    state = _RendezvousState()
    assert (state.round, state.participants) == (0, {})
    assert _NodeDesc("host", 7, 0).pid == 7


def test_default_timeout_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    torch_compat.set_default_timeout(timedelta(seconds=7))
    assert distributed_c10d.default_pg_timeout == distributed_c10d.default_pg_nccl_timeout == timedelta(seconds=7)


def test_published_worker_address_is_not_replaced() -> None:
    store = HashStore()
    torch_compat.publish_worker_address(store, "job", 3, host="first", port=1)
    torch_compat.publish_worker_address(store, "job", 3, host="second", port=2)
    keys = dist.PrefixStore("torch.rendezvous.job.3", store)
    assert (keys.get("MASTER_ADDR"), keys.get("MASTER_PORT")) == (b"first", b"1")
