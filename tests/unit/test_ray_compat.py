"""The private parts of Ray that launch.on_ray.compat uses are there; a real cluster: tests/integration/test_ray.py."""

import inspect

import pytest

pytest.importorskip("ray", reason="ray is not installed")
import ray
import ray._private.state
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.experimental import internal_kv


@pytest.mark.parametrize("method", ["available_resources_per_node", "get_draining_nodes"])
def test_the_global_state_has_the_method(method: str):
    assert not inspect.signature(getattr(ray._private.state.state, method)).parameters


@pytest.mark.parametrize("function", ["_internal_kv_put", "_internal_kv_get", "_internal_kv_del"])
def test_the_key_value_store_has_namespaces(function: str):
    assert "namespace" in inspect.signature(getattr(internal_kv, function)).parameters


def test_token_authentication_can_be_queried():
    assert is_token_auth_enabled() in (True, False)


@pytest.mark.parametrize("method", ["nodes", "get_runtime_context"])
def test_the_public_functions_are_there(method: str):
    assert callable(getattr(ray, method))
