"""Watches a pass over a network for what depends on other shards or on the number of processes."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distributed.exact.check.module_stack import ModuleStack
from distributed.exact.check.problems import Problem
from distributed.exact.check.saved_model import SavedModel
from distributed.exact.check.throwaway import SavedGenerators
from distributed.models.torch_compat import AnyBatchNorm

_KEYED = (
    "use dropout layers (nn.Dropout and the like, torchvision's StochasticDepth, timm's DropPath), whose masks depend only "
    "on seed, epoch and image"
)
_STATE = "compute it in __init__ or in every forward; only batch norm may keep statistics"
_REGISTER = "assign it to an attribute, or use nn.ModuleList or nn.ModuleDict"
_TEMPORARY = "pass values on as arguments, and compute with other weights by F.linear, F.conv2d and the like"
_cuda: Any = torch.backends.cuda
_SWITCHES: dict[str, Callable[[], Any]] = {
    "attention's kernels": lambda: (
        _cuda.flash_sdp_enabled(),
        _cuda.mem_efficient_sdp_enabled(),
        _cuda.math_sdp_enabled(),
    ),
    "oneDNN": lambda: torch.backends.mkldnn.enabled,
    "torch's default dtype": torch.get_default_dtype,
}


class Watch(TorchFunctionMode):
    """Notes which module is running when it draws from a generator or changes something that other shards can see.

    Args:
        saved: the state of the model before the pass.
    """

    def __init__(self, model: nn.Module, saved: SavedModel) -> None:
        super().__init__()
        self.stack = ModuleStack(model, self._before, self._after, unregistered=self._unregistered)
        self.called = set[str]()
        self._modules, self._saved = dict(model.named_modules()), saved
        self._found: list[Problem] = []
        self._temporary: dict[str, dict[str, None]] = {}
        self._generators = SavedGenerators()
        self._switches = {name: get() for name, get in _SWITCHES.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(kwargs.get("generator"), torch.Generator):
            self.add("draws from a torch.Generator, which depends on the number of processes", _KEYED)
        result = func(*args, **kwargs)
        self._note_draws()  # at once: fork_rng restores the generator
        self._note_changes(self.stack.inside)
        for name, get in _SWITCHES.items():
            if get() != self._switches[name]:
                self.add(
                    f"changes {name} for the entire process in forward", "leave it as it is, e.g. without sdpa_kernel"
                )
        return result

    def problems(
        self, changes: Mapping[str, list[str]], accepted: Collection[tuple[str, str]] = ()
    ) -> Iterator[Problem]:
        """Yield what was found, and what the pass has changed for good.

        Args:
            changes: those of the saved state, right after the pass.
            accepted: attributes that may change, each by its module's path and its name.
        """
        yield from self._found
        found = {problem.path for problem in self._found if problem.remedy == _REGISTER}  # its statistics change
        for path in changes:
            names = [name for name in changes[path] if (path, name) not in accepted]
            if names and path not in found:
                yield Problem(path, f"keeps state: forward changes its {', '.join(names)}", _STATE)
        for path, temporary in self._temporary.items():
            if names := [name for name in temporary if name not in changes.get(path, []) and path not in found]:
                shared = f"changes its {', '.join(names)} during forward, which other shards see"
                yield Problem(path, shared, _TEMPORARY)

    def add(self, what: str, remedy: str) -> None:
        """Note a problem of the module whose forward is running."""
        self._found.append(Problem(self.stack.inside, what, remedy))

    def _before(self, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        """Attribute to the calling module what happened since it began or called the last module."""
        self.called.add(path)
        self._note_draws()
        for running in (*self.stack.running, path):
            self._note_changes(running)

    def _after(self, module: nn.Module, path: str, outputs: list[Tensor]) -> None:
        self._note_draws()
        self._note_changes(path)

    def _unregistered(self, module: nn.Module) -> None:
        if isinstance(module, AnyBatchNorm) and (module.training or module.running_mean is None):
            kind = type(module).__name__
            self.add(
                f"calls a {kind} that is not registered as one of its modules, so it would not be synchronized",
                _REGISTER,
            )

    def _note_draws(self) -> None:
        module = self._modules[self.stack.inside]
        for name in self._generators.drawn():
            has_dropout = isinstance(module, nn.MultiheadAttention | nn.RNNBase)
            if not isinstance(module, nn.RReLU):  # refused by its type
                remedy = "set its dropout to 0" if has_dropout else _KEYED
                self.add(f"draws from {name}, which depends on the number of processes", remedy)
            self._generators = SavedGenerators()

    def _note_changes(self, path: str) -> None:
        for name in self._saved.changed_attributes(path):
            self._temporary.setdefault(path, {})[name] = None
