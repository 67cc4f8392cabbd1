"""Calls a user's loss, metric and augmentation functions on a few samples, to find errors before training."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from distributed import rng
from distributed.config.user_code import described, type_name
from distributed.data.augment_function import SETTING, AugmentFunction
from distributed.errors import InputError
from distributed.exact.bits import same_bits
from distributed.exact.check.throwaway import SavedGenerators
from distributed.exact.torch_compat import is_leaf
from distributed.training.losses import PerSample

_SAMPLES = 5
_MIXES = "the result for one sample depends on the others"


class Check:
    """Checks functions on a device. Leaves the global random generators unchanged.

    Args:
        exact: whether functions that combine samples are refused.
        warns: whether they are warned about otherwise.
        captured: whether losses are captured in CUDA graphs, which must not synchronize.
    """

    def __init__(self, device: torch.device, *, dtype: torch.dtype, exact: bool, warns: bool, captured: bool) -> None:
        self._device, self._dtype, self._exact, self._warns, self._captured = device, dtype, exact, warns, captured

    def loss(self, loss: PerSample, path: str, *, num_classes: int) -> None:
        """Check that a loss gives each sample a number of its own, from which gradients flow to the logits.

        Raises:
            InputError: it does not. One line.
        """
        start = f"loss.name = {path}"
        logits, targets = self._inputs(num_classes)
        logits.requires_grad_()
        losses = self._numbers(loss, logits, targets, start=start, what="loss")
        if not losses.requires_grad:
            raise InputError(
                f"{start}: no gradient flows from the losses to the logits; compute them by differentiable operations of "
                "torch, without detach, argmax and no_grad"
            )
        if others := [leaf for leaf in _leaves(losses) if leaf is not logits]:
            raise InputError(
                f"{start}: a tensor of shape {list(others[0].shape)} in the function requires a gradient, but only the "
                "network's parameters are trained and saved; move it into the network, or set its requires_grad to False"
            )
        try:
            with _NoSynchronization(start, active=self._captured):
                first, last = [torch.autograd.grad(losses[i], logits, retain_graph=True)[0] for i in (0, -1)]
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{start}: the backward pass of the loss fails: {described(error)}") from error
        of_others = torch.cat([first[1:], last[:-1]])
        mixes = bool(((of_others != 0) & ~of_others.isnan()).any())  # NaN says nothing: it is zero times infinity
        self._independent(loss, logits.detach(), targets, losses.detach(), start=start, mixes=mixes)

    def metric(self, metric: PerSample, path: str, *, num_classes: int) -> None:
        """Check that a metric gives each sample a number of its own. Raises InputError, one line, if it does not."""
        start = f"evaluation.metrics = {path}"
        logits, targets = self._inputs(num_classes)
        with torch.no_grad():
            values = self._numbers(metric, logits, targets, start=start, what="number")
            self._independent(metric, logits, targets, values, start=start, mixes=False)

    def augmentation(self, function: AugmentFunction, images: Tensor) -> None:
        """Check that an augmentation function changes each image for itself, drawing only from its draws.

        Args:
            images: uint8 [n, h, w, c] on the device, n at least 1.

        Raises:
            InputError: it does not. One line.
        """
        start = f"{SETTING} = {function.path}"
        numbers = torch.arange(_SAMPLES, device=images.device)
        images, keys = images[numbers % len(images)], rng.sample_keys(numbers, seed=0, epoch=0)
        # No two alike in brightness and content, even if the data has a single image.
        for number in range(_SAMPLES):
            images[number] = (images[number].roll(number, 0) * (1 - 0.15 * number) + 10 * number).to(torch.uint8)

        def call(of: slice) -> Tensor:
            return function(images[of], keys[of], [len(keys[of])])

        changed = self._twice(partial(call, slice(None)), start, drawing="draw from the argument `draws`")
        for part in (slice(0, 1), slice(3, None)):
            if not same_bits(call(part), changed[part]):
                raise InputError(
                    f"{start}: the result for one image depends on the others in the batch; compute it from the image and "
                    "its row of `draws` alone"
                )

    def _inputs(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """Return logits [n, num_classes] and targets [n], no two rows alike."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(_SAMPLES, num_classes, generator=generator, dtype=torch.float64).to(self._dtype)
        targets = torch.arange(_SAMPLES) * 7 % num_classes
        return logits.to(self._device), targets.to(self._device)

    def _numbers(self, function: PerSample, logits: Tensor, targets: Tensor, *, start: str, what: str) -> Tensor:
        """Return a function's result [n]. Raises InputError if it is something else, or if the call leaves traces."""
        given, calls = (logits.clone(), targets.clone()), 0

        def call() -> Tensor:
            nonlocal calls
            calls += 1
            try:
                # The first steps of a run are not captured yet: a function may create its constants there.
                with _NoSynchronization(start, active=self._captured and what == "loss" and calls > 1):
                    return function(*given)
            except InputError:
                raise
            except (Exception, SystemExit) as error:
                raise InputError(
                    f"{start}: the function fails on logits {list(logits.shape)} and targets {list(targets.shape)}: "
                    f"{described(error)}"
                ) from error

        def checked() -> Tensor:
            result = call()
            self._check_result(result, start=start, what=what)
            return result

        numbers = self._twice(checked, start, drawing=f"compute the {what} from logits and targets alone")
        if not (same_bits(given[0], logits) and same_bits(given[1], targets)):
            raise InputError(f"{start}: the function changes its arguments; work on a copy: logits.clone()")
        return numbers

    def _check_result(self, result: object, *, start: str, what: str) -> None:
        expected = f"one {what} per sample, a tensor of shape [{_SAMPLES}] for {_SAMPLES} samples"
        if not isinstance(result, Tensor):
            raise InputError(f"{start}: the function returns {type_name(result)}; it should return {expected}")
        if not result.dim():
            raise InputError(f"{start}: the function returns a scalar; it should return {expected}: no mean or sum")
        if list(result.shape) != [_SAMPLES]:
            raise InputError(f"{start}: the function returns shape {list(result.shape)}; it should return {expected}")
        if result.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{start}: the function returns {result.dtype}; it should return torch.float32: .float()")
        if result.device.type != self._device.type:
            raise InputError(
                f"{start}: the function returns a tensor on {result.device}; leave it on {self._device}, where the logits are"
            )

    def _twice(self, call: Callable[[], Tensor], start: str, *, drawing: str) -> Tensor:
        """Return the result of a call. Raises InputError if it draws from a global generator, or a second one differs."""
        generators, of_gpu = SavedGenerators(), self._gpu_state()
        first = call()
        drawn = generators.drawn() + (["the GPU's generator"] if not _is_equal(of_gpu, self._gpu_state()) else [])
        generators.restore()
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu, self._device)
        if drawn:
            raise InputError(
                f"{start}: the function draws from {drawn[0]}, which no resumed run could repeat; {drawing}"
            )
        if not same_bits(first, call()):
            raise InputError(f"{start}: two calls with the same arguments differ; the function should keep no state")
        return first

    def _gpu_state(self) -> Tensor | None:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def _independent(
        self, function: PerSample, logits: Tensor, targets: Tensor, numbers: Tensor, *, start: str, mixes: bool
    ) -> None:
        """Refuse a function that combines samples in exact mode, and warn about it otherwise."""
        for kept in (0, _SAMPLES - 1):
            # Other classes, the last one too: a function's table of numbers for the classes may be too short.
            others, other_targets = logits.flip(1) * -1.5, logits.shape[1] - 1 - targets
            others[kept], other_targets[kept] = logits[kept], targets[kept]
            with torch.no_grad():
                try:
                    among_others = function(others, other_targets)[kept]
                    alone = function(logits[kept : kept + 1].clone(), targets[kept : kept + 1].clone())
                except Exception as error:
                    raise InputError(
                        f"{start}: the function fails on other logits and targets: {described(error)}"
                    ) from error
            if alone.shape != (1,):
                raise InputError(
                    f"{start}: the function returns shape {list(alone.shape)} for 1 sample; it should return [1]: a squeeze "
                    "without a dimension removes that of the samples"
                )
            mixes |= _differ(numbers[kept], among_others) or _differ(numbers[kept], alone[0])
        if mixes and self._exact:
            raise InputError(
                f"{start}: {_MIXES}, which exact mode does not support; compute it for each sample alone, or set "
                "exact.shards = 0"
            )
        if mixes and self._warns:
            logger.warning("{}: {}, so results depend on how the batch is split over the ranks", start, _MIXES)


class _NoSynchronization:
    """Raises InputError if the block synchronizes with the GPU. Context manager."""

    def __init__(self, start: str, *, active: bool) -> None:
        self._start, self._active = start, active

    def __enter__(self) -> None:
        if self._active:
            self._before = torch.cuda.get_sync_debug_mode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this mode is a prototype
                torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._active:
            return
        torch.cuda.set_sync_debug_mode(self._before)
        if error and "synchronizing CUDA operation" in str(error):
            raise InputError(
                f"{self._start}: the function synchronizes with the GPU, e.g. by .item(), or a tensor created from a list; "
                "CUDA graphs cannot; avoid that, or set cuda_graphs = false"
            ) from error


def _leaves(result: Tensor) -> list[Tensor]:
    """Return the tensors to which a backward pass from the result gives gradients."""
    found, seen, waiting = list[Tensor](), set[Any](), [result.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if is_leaf(node) else []
        waiting += [target for target, _ in node.next_functions]
    return found


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two numbers differ by more than rounding."""
    return not torch.isclose(one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True)


def _is_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one, other)
