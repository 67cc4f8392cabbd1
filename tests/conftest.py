"""What every test must leave as it found it: the environment, and a process without a process group."""

import os
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def a_process_left_as_it_was() -> Iterator[None]:
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
    dist = sys.modules.get("torch.distributed")  # not imported here: most config tests need no torch
    if dist and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group initialised")


@pytest.fixture
def threads_and_log_as_they_were() -> Iterator[None]:
    """For tests that train in their own process."""
    import torch
    from loguru import logger

    threads = torch.get_num_threads()
    logger.remove()
    yield
    logger.remove()
    torch.set_num_threads(threads)
