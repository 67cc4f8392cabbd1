"""The driver's connection to a Ray that cannot be joined."""

import os

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed")

from distributed.errors import InputError  # noqa: E402
from launch.on_ray.connection import connected  # noqa: E402
from launch.on_ray.environment import set_environment  # noqa: E402

pytestmark = pytest.mark.usefixtures("restore_threads_and_log")


@pytest.mark.parametrize(
    ("address", "where"),
    [("", "the Ray on this machine: "), ("10.0.0.1:6379", "environment: RAY_ADDRESS = 10.0.0.1:6379: ")],
)
def test_a_ray_of_another_version_is_one_line(address: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.60.0")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError) as error, connected("WARNING"):
        pass
    [line] = error.value.lines
    assert line.startswith(f"{where}Version mismatch: The cluster was started with: Ray: 2.60.0; start Ray")


def test_variables_that_ray_refuses_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left over from other programs; Ray's own documents name them."""
    monkeypatch.setattr(os, "environ", os.environ | {"RAY_TRAIN_V2_ENABLED": "0", "TUNE_RESULT_DIR": "/results"})
    set_environment()
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
    assert "TUNE_RESULT_DIR" not in os.environ
