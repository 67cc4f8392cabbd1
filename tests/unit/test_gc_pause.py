import gc
import sys

import pytest

from distributed.process import gc_pause


@pytest.fixture
def before_torch(monkeypatch):
    """Make this process look as if torch were not imported yet."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("before_torch")
def test_gc_is_paused_and_imports_are_frozen():
    with gc_pause.gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000


@pytest.mark.usefixtures("before_torch")
def test_failed_import_reenables_the_collector():
    with pytest.raises(ModuleNotFoundError), gc_pause.gc_paused():
        raise ModuleNotFoundError
    assert gc.isenabled()


@pytest.mark.usefixtures("before_torch")
def test_disabled_collector_stays_disabled():
    gc.disable()
    try:
        with gc_pause.gc_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_no_op_once_torch_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    frozen = gc.get_freeze_count()
    with gc_pause.gc_paused():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
