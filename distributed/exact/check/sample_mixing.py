"""Finds networks in which the output for one image depends on other images of the batch, other than by batch norm."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed.exact.bits import same_bits
from distributed.exact.check.module_stack import ModuleStack
from distributed.exact.check.problems import Problem
from distributed.exact.check.throwaway import SavedGenerators
from distributed.models.keyed_dropout import use_sample_keys
from distributed.models.torch_compat import AnyBatchNorm

MIXES = "mixes the samples of a batch: the output for one image depends on the others"
_PER_SAMPLE = "compute it for each sample alone; only batch norm layers may combine samples"
_VARIES = "does not repeat itself: two passes over the same images differ"
_REPEAT = "draw random numbers only in dropout layers, and keep no state"


def find_mixing(model: nn.Module, images: Tensor, keys: Tensor) -> Problem | None:
    """Compare and differentiate throwaway passes in training mode, batch norm's statistics being constants.

    Changes the weights; the caller restores them.

    Args:
        images: [n, 3, side, side], all different.
        keys: of the dropout masks, int64 [n, 2].
    """
    fill_constant_weights(model)
    passes = _Passes(model, keys)
    inputs = images.clone().requires_grad_()
    with_graph = passes.run(inputs)  # by other kernels: its bits say nothing about repeats
    return _mixing(passes, images, lambda kept: passes.depends_on_others(with_graph, inputs, kept))


def mixing_in_evaluation(model: nn.Module, images: Tensor, keys: Tensor) -> Problem | None:
    """Compare passes in evaluation mode, with weights that are not constant. Arguments as for `find_mixing`."""
    if any(isinstance(m, AnyBatchNorm) and m.running_mean is None for m in model.modules()):
        return None  # it normalizes by the batch in evaluation too, synchronized
    return _mixing(_Passes(model, keys), images, lambda kept: False)


def _mixing(passes: "_Passes", images: Tensor, depends_on_others: Callable[[int], bool]) -> Problem | None:
    """Compare the passes of batches that share one sample `kept`; `depends_on_others(kept)` may find mixing that they miss."""
    logits = passes.run(images)
    repeats = same_bits(logits, passes.run(images))
    for kept in (0, len(images) - 1):
        others = _others(images, kept)
        differs = _differ(logits[kept], passes.run(others)[kept])
        if (differs and repeats) or depends_on_others(kept):
            return Problem(passes.first_difference(images, others, kept), MIXES, _PER_SAMPLE)
    return None if repeats else Problem(passes.first_difference(images, images, 0), _VARIES, _REPEAT)


def _others(images: Tensor, kept: int) -> Tensor:
    """Return a batch in which all images but one are other ones."""
    others = images.flip(-1) * -1.5
    others[kept] = images[kept]
    return others


class _Call(NamedTuple):
    path: str
    before: list[Tensor]
    after: list[Tensor]


class _Passes:
    """Forward passes that start from the same states of the random generators."""

    def __init__(self, model: nn.Module, keys: Tensor) -> None:
        self._model, self._keys, self._generators = model, keys, SavedGenerators()

    def run(self, images: Tensor, stack: ModuleStack | None = None) -> Tensor:
        """Return the logits [n, classes] of images, which are not changed; with a graph if they require gradients."""
        self._generators.restore()
        with (
            torch.set_grad_enabled(images.requires_grad),
            use_sample_keys(self._keys),
            stack or ModuleStack(self._model),
        ):
            output: Tensor = self._model(images.clone())
        return output

    def depends_on_others(self, logits: Tensor, inputs: Tensor, kept: int) -> bool:
        """Whether the gradient of the logits of sample `kept` by other samples' inputs is not zero.

        A NaN says nothing: it is zero times infinity, e.g. behind the square root of zero. Changes all gradients.
        """
        row, inputs.grad = logits[kept], None
        # Weights in general position: gradients of different logits do not cancel.
        weights = 0.5 + torch.rand(row.shape, generator=torch.Generator().manual_seed(0))
        if row.requires_grad:
            with use_sample_keys(self._keys):  # not autograd.grad, which reentrant checkpointing rejects
                (row * weights).sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        if inputs.grad is None:
            return False
        others = torch.cat([inputs.grad[:kept], inputs.grad[kept + 1 :]])
        return bool(((others != 0) & ~others.isnan()).any())

    def first_difference(self, images: Tensor, others: Tensor, kept: int) -> str:
        """Return the path of the first module, inner before outer, that treats sample `kept` differently in two batches."""
        first, second = self._calls(images, kept), self._calls(others, kept)
        for (path, inputs, outputs), (_, other_inputs, other_outputs) in zip(first, second, strict=False):
            if all(map(same_bits, inputs, other_inputs)) and not all(map(same_bits, outputs, other_outputs)):
                return path
        return ""

    def _calls(self, images: Tensor, kept: int) -> list[_Call]:
        """Return what belongs to sample `kept` in the inputs and outputs of all modules' calls, in the order of their ends."""
        begun: list[list[Tensor]] = []
        ended: list[_Call] = []

        def rows(values: list[Tensor]) -> list[Tensor]:
            found = [v for v in values if v.dim() and v.numel() and len(v) % len(images) == 0]
            return [v.detach().reshape(len(images), -1)[kept].clone() for v in found]

        self.run(
            images,
            ModuleStack(
                self._model,
                before=lambda _, path, inputs: begun.append(rows(inputs)),
                after=lambda _, path, outputs: ended.append(_Call(path, begun.pop(), rows(outputs))),
            ),
        )
        return ended


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether two samples' logits differ by more than rounding, which may depend on how many samples an expert gets."""
    finite = first.isfinite() & second.isfinite()
    if not torch.equal(first.isfinite(), second.isfinite()) or not bool(finite.any()):
        return bool(first.isfinite().any() or second.isfinite().any())
    return bool((first - second)[finite].abs().max() > 1e-4 * first[finite].abs().max())


def fill_constant_weights(model: nn.Module) -> None:
    """Change parameters whose elements are all equal, e.g. a head or a branch's scale of zeros, which would hide mixing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        data = parameter.detach()
        if data.is_floating_point() and data.numel() and bool((data == data.reshape(-1)[0]).all()):
            fan_in = data[0].numel() if data.dim() > 1 else 10
            changes = (0.5 + torch.rand(data.shape, generator=generator)) * fan_in**-0.5
            parameter.data = torch.empty_like(data).copy_(data + changes)
