"""Fixtures of the integration tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.user_modules import started_in


@pytest.fixture
def here(folder: Path) -> Iterator[None]:
    """As if the commands of this process had been started by `python -m` in the module's `folder`."""
    with started_in(folder):
        yield
