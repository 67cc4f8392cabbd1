"""Checks that only batch norm combines the samples of a batch, and that nothing else depends on the number of processes."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from distributed.errors import InputError
from distributed.exact.check.batch_norm_constants import record_statistics, use_recorded
from distributed.exact.check.evaluation_pass import watch_evaluation
from distributed.exact.check.problems import Problem, described
from distributed.exact.check.registered import can_run, registered
from distributed.exact.check.sample_mixing import MIXES, find_mixing
from distributed.exact.check.saved_model import unchanged
from distributed.exact.check.throwaway import throwaway_batch
from distributed.exact.check.training_pass import watch_training
from distributed.models.keyed_dropout import use_sample_keys


def check_exact(model: nn.Module, images: Tensor, *, device_type: str = "cpu") -> None:
    """Check that exact mode supports a network. Leaves it and the global random generators unchanged, bit for bit.

    Args:
        model: float32 on the CPU, before any conversion of its batch norm layers; dropout layers are keyed.
        images: [n, 3, side, side], n at least 1; at most 3 are used.
        device_type: of the training; the check itself runs on the CPU.

    Raises:
        InputError: it does not; one line for each kind of problem, with its first module and the remedy.
    """
    problems = registered(model)
    if can_run(model):
        try:
            for problem in _in_passes(model, images, device_type):
                problems.append(problem)
        except Exception:
            if not problems:  # which explain more than the failure of a pass
                raise
    if problems:
        lines = described(model, problems)
        raise InputError(*(f"exact.shards > 0: {line}; or set exact.shards = 0" for line in lines))


def mixes_samples(model: nn.Module, images: Tensor) -> str:
    """Return where a network mixes samples outside batch norm, and the remedy; "" if it does not.

    Leaves the network and the global random generators unchanged, bit for bit. Arguments as for `check_exact`.
    """
    if not can_run(model):
        return ""
    images, keys = throwaway_batch(images)
    with unchanged(model):
        model.train()
        layers = record_statistics(model)
        with torch.no_grad(), use_sample_keys(keys):
            model(images.clone())
        use_recorded(layers)
        problem = find_mixing(model, images, keys)
    return described(model, [problem])[0] if problem and problem.what == MIXES else ""


def changed_by_forward(model: nn.Module, images: Tensor, *, after_first: bool = False) -> list[str]:
    """Return the attributes and buffers that a forward pass changes, e.g. `block.calls`, except batch norm's.

    Leaves the network and the global random generators unchanged, bit for bit. Arguments as for `check_exact`.

    Args:
        after_first: a first pass, with another number of images, may change what it likes, e.g. fill a cache.
    """
    if not can_run(model):
        return []
    images, keys = throwaway_batch(images)
    with unchanged(model), torch.no_grad():
        model.train()
        if after_first:
            with use_sample_keys(keys[:2]):
                model(images[:2])
        with unchanged(model) as saved, use_sample_keys(keys):
            model(images)
            return [f"{path}.{name}".lstrip(".") for path, names in saved.changes().items() for name in names]


def replaced_tensors(model: nn.Module, images: Tensor) -> list[str]:
    """Return the parameters and buffers that have other memory after a forward pass, instead of being changed in place.

    Leaves the network and the global random generators unchanged, bit for bit. Arguments as for `check_exact`.
    """
    if not can_run(model):
        return []
    images, keys = throwaway_batch(images)
    with unchanged(model):
        before = _addresses(model)
        model.train()
        with torch.no_grad(), use_sample_keys(keys):
            model(images)
        after = _addresses(model)
        return [path for path, addresses in before.items() if after.get(path) != addresses]


def _addresses(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return where each parameter and buffer and its memory are."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {path: (id(tensor), tensor.data_ptr()) for path, tensor in tensors}


def _in_passes(model: nn.Module, images: Tensor, device_type: str) -> Iterator[Problem]:
    images, keys = throwaway_batch(images)
    found = set[str]()
    with unchanged(model) as saved:
        model.train()
        layers = record_statistics(model)
        for problem in watch_training(model, images, keys, saved):
            found.add(problem.path)
            yield problem
        use_recorded(layers)
        mixing = find_mixing(model, images, keys)
        # What was found in a module may explain that it mixes samples, and anything why passes differ.
        if mixing and not (mixing.path in found if mixing.what == MIXES else found):
            found.add(mixing.path)
            yield mixing
    in_evaluation = watch_evaluation(model, images, keys, may_cache=device_type == "cpu")
    yield from (problem for problem in in_evaluation if problem.path not in found)
