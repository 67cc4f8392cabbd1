import gc
import sys

import pytest

from distributed.process import gc_pause


@pytest.fixture
def before_torch(monkeypatch):
    """Make this process look as if it had not imported torch yet."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("before_torch")
def test_the_collector_rests_and_passes_over_what_came_in():
    with gc_pause.at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000


@pytest.mark.usefixtures("before_torch")
def test_an_import_that_fails_leaves_the_collector_at_work():
    with pytest.raises(ModuleNotFoundError), gc_pause.at_rest():
        raise ModuleNotFoundError
    assert gc.isenabled()


@pytest.mark.usefixtures("before_torch")
def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with gc_pause.at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_once_torch_is_there_nothing_is_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    frozen = gc.get_freeze_count()
    with gc_pause.at_rest():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
