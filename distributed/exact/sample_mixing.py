"""Finds networks in which the output for one image depends on other images of the batch, other than by batch norm."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distributed import rng
from distributed.exact.batch_norm_constants import BatchNormConstants
from distributed.exact.forward_trace import ModuleStack
from distributed.exact.generator_states import SavedGenerators
from distributed.exact.generic_weights import fill_constant_weights, redraw_weights
from distributed.exact.mixing_module import ModuleCalls, crosses, first_crossing, first_difference
from distributed.exact.reasons import Paths, Reason
from distributed.exact.registered import can_run
from distributed.exact.saved_model import SavedModel, same_bits, unchanged
from distributed.models.keyed_dropout import use_sample_keys

MIXES = "mixes the samples of a batch: the output for one image depends on the others"
_PER_SAMPLE = "compute it for each sample alone; nn.BatchNorm layers alone may combine samples"
_VARIES = "does not repeat itself: two passes over the same images differ"
_REPEAT = "draw from keys of the samples, and keep no state outside the network"


def mixes_samples(model: nn.Module, images: Tensor) -> str:
    """Return where the network mixes samples outside batch norm, and the remedy; "" if it does not.

    Leaves the model and the global random generators unchanged, bit for bit.

    Args:
        model: float32 on the CPU, before any conversion of its batch norm layers.
        images: [n, 3, side, side], n at least 1; at most 3 are used.
    """
    if not can_run(model):
        return ""
    images, keys = throwaway_batch(images)
    with unchanged(model):
        model.train()
        with BatchNormConstants(model).recording() as constants:
            reason = find_mixing(model, images, keys, constants, recorded=False)
    return str(reason) if reason and reason.problem == MIXES else ""


def throwaway_batch(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return 3 different images, made from the first of `images`, and their sample keys."""
    # An odd number, so that dimensions of other meanings, mostly even, are not mistaken for that of the samples.
    images = images[torch.arange(3) % len(images)].detach().float()
    ramp = torch.linspace(0.9, 1.1, images[0].numel()).view_as(images[0])
    images = torch.stack([image * ramp**index + 0.01 * index for index, image in enumerate(images)])
    return images, rng.sample_keys(torch.arange(3), seed=0, epoch=0)


def find_mixing(
    model: nn.Module, images: Tensor, keys: Tensor, constants: BatchNormConstants, *, recorded: bool
) -> Reason | None:
    """Compare and differentiate throwaway passes in training mode with batch norm's statistics as constants.

    Args:
        images: [n, 3, side, side], all different.
        keys: of the dropout masks, int64 [n, 2].
        constants: of the model's batch norm layers.
        recorded: whether they have recorded the statistics of a pass over the images.
    """
    for prepare, record in ((fill_constant_weights, not recorded), (redraw_weights, True)):
        prepare(model)
        if record:
            constants.record()
            _Passes(model, keys).run(images)
        constants.use()
        passes = _Passes(model, keys)
        if _shows_inputs(passes, images):
            return _mixing(passes, images)
    return None  # its outputs do not depend on its inputs, or are not finite


def _shows_inputs(passes: "_Passes", images: Tensor) -> bool:
    """Whether the logits are finite and change with the images: neither overflowed nor vanished on the way."""
    logits, others = passes.run(images), passes.run(images.flip(-1) * 2.0)
    return bool(logits[[0, -1]].isfinite().any()) and not same_bits(logits, others)


class _Passes:
    """Forward passes that start from the same state of the model, parameters excepted, and of the generators."""

    def __init__(self, model: nn.Module, keys: Tensor) -> None:
        self.model = model
        self._keys, self._saved, self._generators = keys, SavedModel(model, parameters=False), SavedGenerators()

    def run(self, images: Tensor, calls: ModuleCalls | None = None, *, gradients: bool = False) -> Tensor:
        """Return the logits [n, classes] of images, which are not changed."""
        self._generators.restore()
        self._saved.restore()
        stack = ModuleStack(self.model)
        with torch.set_grad_enabled(gradients), use_sample_keys(self._keys), stack.watched(*[calls] if calls else []):
            output: Tensor = self.model(images.clone())
        return output


def _mixing(passes: _Passes, images: Tensor) -> Reason | None:
    paths, samples = Paths(passes.model), len(images)
    varies: Reason | None = None
    logits = passes.run(images)
    for kept, others in _replaced(images):
        if not same_bits(logits[kept], passes.run(others)[kept]):
            repeats = same_bits(logits, passes.run(images))
            calls = [ModuleCalls(samples, kept), ModuleCalls(samples, kept)]
            for batch, call in zip((images, others if repeats else images), calls, strict=True):
                passes.run(batch, call)
            where = first_difference(*calls)
            if repeats:
                return paths.reason(where, MIXES, _PER_SAMPLE)
            varies = paths.reason(where, _VARIES, _REPEAT)
    path = _mixing_by_gradient(passes, images)
    return varies if path is None else paths.reason(path, MIXES, _PER_SAMPLE)


def _replaced(images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first and the last position, and a batch in which all others hold other images."""
    for kept, factor in ((0, -1.5), (len(images) - 1, 2.0)):
        others = images.flip(-1) * factor
        others[kept] = images[kept]
        yield kept, others


def _mixing_by_gradient(passes: _Passes, images: Tensor) -> str | None:
    """Return the path of a module that mixes samples by the gradient of the first and last output, or None."""
    inputs, samples = images.clone().requires_grad_(), len(images)
    logits = passes.run(inputs, gradients=True)
    for kept in (0, samples - 1):
        if crosses(logits, inputs, kept, samples):
            calls = ModuleCalls(samples)
            return first_crossing(calls, passes.run(inputs, calls, gradients=True), kept)
    return None
