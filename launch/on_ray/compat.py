"""Private APIs of Ray 2.60: the public one lacks free resources per node, draining nodes and a key-value store.

`tests/unit/test_ray_compat.py` fails if a later version no longer has one of them.
"""

from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.experimental import internal_kv

_NAMESPACE = b"distributed"


@dataclass(frozen=True)
class ClusterNode:
    """A node that the cluster knows."""

    id: str
    alive: bool
    hostname: str
    address: str
    resources: dict[str, float]
    """All resources of the node, free or not, e.g. `{"CPU": 8.0}`."""


def cluster_nodes() -> list[ClusterNode]:
    """Return every node that has been part of the cluster, lost ones included."""
    nodes: Any = ray.nodes  # without annotations
    return [
        ClusterNode(
            id=node["NodeID"],
            alive=node["Alive"],
            hostname=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            resources=node.get("Resources", {}),
        )
        for node in nodes()
    ]


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of each node, by its id."""
    return dict(_state().available_resources_per_node())


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are about to be removed and get no new work."""
    return set(_state().get_draining_nodes())


def requires_token() -> bool:
    """Whether the cluster accepts only clients with its token."""
    return bool(is_token_auth_enabled())


def put_value(key: str, value: str) -> None:
    """Store a value under a key, for every process of the cluster."""
    internal_kv._internal_kv_put(key, value, namespace=_NAMESPACE)


def get_value(key: str) -> str | None:
    """Return the value of a key; None if it has none."""
    value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return None if value is None else str(value.decode())


def delete_value(key: str) -> None:
    """Remove a key and its value."""
    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def _state() -> Any:
    return ray._private.state.state
