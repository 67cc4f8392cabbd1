"""Python's garbage collector, at rest while torch is imported: that makes a million objects and hardly any garbage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_rest() -> Iterator[None]:
    """A context to import large libraries in, a fifth faster; later collections skip their objects. It acts once."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
