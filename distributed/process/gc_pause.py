"""When the garbage collector runs: not while large libraries are imported, which makes no garbage; at the end of a run."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def gc_paused() -> Iterator[None]:
    """Context manager for importing large libraries, which becomes a fifth faster. A no-op once torch is imported.

    The objects created inside are frozen, i.e. exempt from later collections.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def then_collect_garbage(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose local objects take much memory: free it when the function returns.

    FSDP2's modules, figures and some networks form cycles. The collector counts objects, not their bytes or open files, so
    it would let several runs in one process pile up.
    """

    @wraps(function)
    def collecting(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            gc.collect()

    return collecting
