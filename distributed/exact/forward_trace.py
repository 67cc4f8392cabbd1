"""Watches the forward calls of all modules of a network, from outside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from distributed.exact.reasons import Paths


class Watcher(Protocol):
    """Is called around every module's forward. `inside` is the path of the innermost module at work until then."""

    def before(self, inside: str, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        """Called before the forward of the module at `path`."""
        ...

    def after(self, module: nn.Module, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Called after it."""
        ...


class ModuleStack:
    """The modules whose forward is running, outermost first."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = Paths(model)
        self.running: list[tuple[nn.Module, str]] = []

    @property
    def inside(self) -> str:
        """The path of the innermost module whose forward is running."""
        return self.running[-1][1] if self.running else ""

    @contextmanager
    def watched(self, *watchers: Watcher) -> Iterator[None]:
        """Call the watchers around each forward. Context manager."""

        def before(module: nn.Module, inputs: Any) -> None:
            path = self._paths.of(module)
            if path is not None:
                for watcher in watchers:
                    watcher.before(self.inside, module, path, tensors(inputs))
                self.running.append((module, path))

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            if not any(module is running for running, _ in self.running):
                return
            while self.running:  # a forward that failed may have left others on the stack
                last, path = self.running[-1]
                if last is module:
                    for watcher in watchers:
                        watcher.after(module, path, tensors(inputs), tensors(output))
                self.running.pop()
                if last is module:
                    return

        handles = [
            register_module_forward_pre_hook(before),
            register_module_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.running.clear()


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return []


Forward = Callable[[Tensor], Tensor]
