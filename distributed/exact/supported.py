"""Checks that a network can be trained in exact mode: only batch norm may depend on other samples of the batch."""

from torch import Tensor, nn

from distributed.errors import InputError
from distributed.exact.batch_norm_constants import BatchNormConstants
from distributed.exact.reasons import Reason, grouped
from distributed.exact.registered import can_run, registered
from distributed.exact.sample_mixing import MIXES, find_mixing, throwaway_batch
from distributed.exact.saved_model import unchanged
from distributed.exact.training_pass import observe


def check_exact(model: nn.Module, images: Tensor | None = None) -> None:
    """Check a network by what it registers and by throwaway passes over a few images.

    Leaves the model and the global random generators unchanged, bit for bit.

    Args:
        model: float32 on the CPU, before any conversion of its batch norm layers; dropout layers are keyed.
        images: [n, 3, side, side], n at least 1; at most 3 are used. None: no passes.

    Raises:
        InputError: exact mode does not support the network; one line for each problem, with its first module and remedy.
    """
    reasons = registered(model)
    if images is not None and can_run(model):
        try:
            _add_from_passes(reasons, model, images)
        except Exception:
            if not reasons:  # otherwise what was found explains more than the failure of the pass
                raise
    if reasons:
        raise InputError(*(f"exact.shards > 0: {line}; or set exact.shards = 0" for line in grouped(reasons)))


def _add_from_passes(reasons: list[Reason], model: nn.Module, images: Tensor) -> None:
    images, keys = throwaway_batch(images)
    with unchanged(model) as saved:
        model.train()
        with BatchNormConstants(model).recording() as constants:
            for reason in observe(model, images, keys, saved):
                reasons.append(reason)
            mixing = find_mixing(model, images, keys, constants, recorded=True)
            # Passes that differ are explained by any other reason.
            if mixing and (mixing.problem == MIXES or not reasons):
                reasons.append(mixing)
