"""A throwaway pass in evaluation mode that finds what exact mode does not support."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from distributed.exact.check.problems import Problem
from distributed.exact.check.sample_mixing import fill_constant_weights, mixing_in_evaluation
from distributed.exact.check.saved_model import SavedModel, unchanged
from distributed.exact.check.watch import Watch
from distributed.models.keyed_dropout import use_sample_keys


def watch_evaluation(model: nn.Module, images: Tensor, keys: Tensor, *, may_cache: bool) -> Iterator[Problem]:
    """Yield the problems that `eval` and a forward pass in evaluation mode show. Leaves the model unchanged.

    Args:
        images: [n, 3, side, side].
        keys: of the dropout masks, int64 [n, 2].
        may_cache: accept what forward keeps in evaluation and `train` drops. On CUDA another shard's stream would not wait for
            a cached tensor.
    """
    with unchanged(model):
        yield from _of_switching(model)
    with unchanged(model):
        model.train()
        fill_constant_weights(model)  # a head of zeros would hide mixing
        model.eval()
        saved = SavedModel(model)
        watch = Watch(model, saved)
        with torch.no_grad(), use_sample_keys(keys), watch.stack, watch:
            model(images.clone())
        changes = saved.changes()
        problems = list(watch.problems(changes, _dropped_by_train(model, saved, changes) if may_cache else ()))
        model.eval()
        if not problems and (mixing := mixing_in_evaluation(model, images, keys)):
            problems.append(mixing)
        yield from (problem._replace(what=f"in evaluation, {problem.what}") for problem in problems)


def _dropped_by_train(model: nn.Module, saved: SavedModel, changes: Mapping[str, list[str]]) -> set[tuple[str, str]]:
    """Call `train`; return the path and name of each changed attribute that now has its saved value again."""
    model.train()
    return {(path, name) for path, names in changes.items() for name in names if saved.is_restored(path, name)}


def _of_switching(model: nn.Module) -> Iterator[Problem]:
    """Yield the modules whose `eval` changes tensors: evaluating would change the training, if only by rounding."""
    model.train()
    fill_constant_weights(model)  # at first, LoRA's product is zero
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
