"""Watches the forward calls of a network's modules, from outside."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModuleStack(ExitStack):
    """The modules whose forward is running, within the context.

    Args:
        before: called with (module, path, input tensors) before a forward, while `inside` is the calling module.
        after: called with (module, path, output tensors) after a forward, while `inside` is still this module.
        unregistered: called with each module that runs but is not one of the network's.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[nn.Module, str, list[Tensor]], None] | None = None,
        after: Callable[[nn.Module, str, list[Tensor]], None] | None = None,
        unregistered: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self.running: list[str] = []
        """The paths of the modules whose forward is running, outer before inner."""
        self._callbacks, self._unregistered = (before, after), unregistered

    @property
    def inside(self) -> str:
        """The path of the innermost module whose forward is running."""
        return self.running[-1] if self.running else ""

    def __enter__(self) -> Self:
        self.callback(register_module_forward_pre_hook(self._before).remove)
        self.callback(register_module_forward_hook(self._after, always_call=True).remove)
        return self

    def _before(self, module: nn.Module, inputs: Any) -> None:
        path, callback = self._paths.get(id(module)), self._callbacks[0]
        if path is not None:
            if callback:
                callback(module, path, tensors(inputs))
            self.running.append(path)
        elif self._unregistered:
            self._unregistered(module)

    def _after(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        path, callback = self._paths.get(id(module)), self._callbacks[1]
        if path in self.running:
            while self.inside != path:  # their forward failed
                self.running.pop()
            if callback:
                callback(module, self.inside, tensors(output))
            self.running.pop()


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, list | tuple) else []
