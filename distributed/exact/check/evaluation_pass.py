"""A throwaway pass in evaluation mode that finds what exact mode does not support."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distributed.exact.check.problems import Problem
from distributed.exact.check.sample_mixing import fill_constant_weights
from distributed.exact.check.saved_model import SavedModel, unchanged
from distributed.exact.check.watch import Watch
from distributed.models.keyed_dropout import use_sample_keys


def watch_evaluation(model: nn.Module, images: Tensor, keys: Tensor) -> Iterator[Problem]:
    """Yield the problems that `eval` and a forward pass in evaluation mode show. Leaves the model unchanged.

    Args:
        images: [n, 3, side, side].
        keys: of the dropout masks, int64 [n, 2].
    """
    with unchanged(model):
        yield from _of_switching(model)
    with unchanged(model):
        model.eval()
        watch = Watch(model, SavedModel(model))
        with torch.no_grad(), use_sample_keys(keys), watch.stack, watch:
            model(images.clone())
        yield from watch.problems()


def _of_switching(model: nn.Module) -> Iterator[Problem]:
    """Yield the modules whose `eval` changes tensors: evaluating would change the training, if only by rounding."""
    model.train()
    fill_constant_weights(model)  # LoRA adds a product of zeros at first
    owned = {path: {*m._parameters, *m._buffers, *m._modules} for path, m in model.named_modules()}
    saved = SavedModel(model)
    model.eval()
    for path, names in saved.changes().items():
        if changed := [name for name in names if name in owned[path]]:
            yield Problem(
                path,
                f"changes its {', '.join(changed)} in eval(), so that evaluating would change the training",
                "compute it in forward, e.g. with merge_weights=False in loralib",
            )
