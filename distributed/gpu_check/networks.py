"""Step 3: checks that steps of every network and precision never wait for the device, repeat and are close to float64."""

import time
from typing import Any

import torch

from distributed.comm.process_group import choose_device
from distributed.config import TrainConfig
from distributed.data.pipeline import DataPipeline
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.differences import differing
from distributed.gpu_check.network_runs import Run, Trajectory, config_of, initial_model
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic
from distributed.training.precision import fast_precision

_NETWORKS = ("improved_alexnet", "cifar_alexnet", "fast_alexnet", "cifar_alexnet_bn", "alexnet")
_BOUNDS = {"float64": (1e-9, 1e-8), "float32": (5e-6, 1e-3), "bfloat16": (1e-2, 5e-2), "float16": (2e-3, 1e-2)}
"""Bounds on the relative errors of loss and gradient norm in the first step; ten times as large in the second."""
_EVERYTHING = (
    "--data.augment.mixup", "0.4", "--data.augment.cutmix", "1", "--data.augment.cutout", "8",
    "--loss.label_smoothing", "0.1", "--optim.name", "adamw", "--optim.max_grad_norm", "0.5", "--optim.ema_decay", "0.99",
)  # fmt: skip
_CPU = torch.device("cpu")


def run(checks: Checks) -> None:
    """Check fast mode with all networks and precisions, then all options together, exact mode and compiled models."""
    device = choose_device(checks.device.type, Topology())
    make_deterministic(device, precision="float32")
    for network in _NETWORKS[:3] if checks.tiny else _NETWORKS:  # the others are too slow on a CPU
        _network(checks, device, network)
    _everything(checks, device)
    _exact(checks, device)
    if checks.is_cuda:  # last: it takes longest, and compiling for a CPU proves nothing here
        _compiled(checks, device)


def _batch(checks: Checks, network: str) -> int:
    """Return the batch size, small if the float64 reference on the CPU would be slow."""
    if checks.tiny:  # with fewer images, fast_alexnet's maxima magnify float32's roundings
        return 64 if network == "fast_alexnet" else 8
    return {"improved_alexnet": 128, "alexnet": 16}.get(network, 64)


def _precisions(checks: Checks, network: str) -> list[str]:
    low = fast_precision(checks.device)
    if network == "improved_alexnet":  # float16 is a hundred times as slow on a CPU
        return ["float64", *_float32_and(low), *([] if checks.tiny else ["float16"])]
    return [low] if checks.tiny else [*_float32_and(low), "float16"]


def _float32_and(precision: str) -> list[str]:
    return list(dict.fromkeys(["float32", precision]))


def _network(checks: Checks, device: torch.device, network: str) -> None:
    batch, model = _batch(checks, network), initial_model(network)
    expected = Run(config_of(network, "float64", batch), _CPU, model=model).trajectory()
    data: DataPipeline | None = None
    for precision in _precisions(checks, network):
        name = f"{network} {precision}"
        shared = None if precision == "float64" else data
        run = _built(checks, name, config_of(network, precision, batch), device, data=shared, model=model)
        if run is None:
            continue
        if precision != "float64":
            data = run.data
        _check(checks, name, run, expected)
        if precision == "float32" and checks.is_cuda:
            _tf32(checks, network, run, expected)


def _built(checks: Checks, name: str, config: TrainConfig, device: torch.device, **arguments: Any) -> Run | None:
    """Build an engine and take throwaway steps, in float16 enough to settle the loss scale. Return None if that failed."""
    with checks.check(f"{name}: built and warmed up"):
        run = Run(config, device, **arguments)
        run.warm_up(4 if config.precision == "float16" else 1)
        return run
    return None


def _check(checks: Checks, name: str, run: Run, expected: Trajectory, *, reference: str = "float64 on the CPU") -> None:
    """Check an engine's first steps against `expected`, those of the reference."""
    found: Trajectory | None = None
    with checks.check(f"{name}: repeatable bit for bit"):
        found = run.trajectory()
        _assert_same(run.trajectory(), found)
    with checks.check(f"{name}: never waits for the device"):
        lines = run.waits()
        assert not lines, f"waits at {', '.join(lines)}"
    with checks.check(f"{name}: deterministic") as figures:
        deterministic, operations = run.deterministic_trajectory()
        figures["same bits in torch's deterministic mode"] = bool(found) and not differing(
            deterministic.tensors, found.tensors
        )
        assert not operations, "; ".join(operations)
    with checks.check(f"{name}: close to {reference}") as figures:
        assert found, "no steps to compare: the earlier check failed"
        _assert_close(figures, found, expected, run.config.precision)


def _assert_same(found: Trajectory, expected: Trajectory) -> None:
    different = differing(found.tensors, expected.tensors)
    assert not different, f"{len(different)} of {len(expected.tensors)} tensors differ, e.g. {different[:4]}"
    assert (found.losses, found.norms) == (expected.losses, expected.norms), (found.losses, expected.losses)


def _errors(found: Trajectory, expected: Trajectory) -> tuple[list[float], list[float]]:
    """Return the relative errors of the losses and of the gradient norms, one per step."""
    pairs = ((found.losses, expected.losses), (found.norms, expected.norms))
    losses, norms = ([abs(a / b - 1) for a, b in zip(one, other, strict=True)] for one, other in pairs)
    return losses, norms


def _assert_close(figures: dict[str, Any], found: Trajectory, expected: Trajectory, precision: str) -> None:
    figures["loss"], figures["norm"] = _errors(found, expected)
    for name, bound in zip(("loss", "norm"), _BOUNDS[precision], strict=True):
        first, second = figures[name]
        assert first < bound, f"{name}: bound {bound}"
        assert second < 10 * bound, f"{name} of the second step: bound {10 * bound}"


def _tf32(checks: Checks, network: str, run: Run, expected: Trajectory) -> None:
    """Measure the effect of TF32 in convolutions, and check that float32 does not use it by default."""
    with checks.check(f"{network}: float32 is not TF32") as figures:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = convolutions.fp32_precision
        found = run.trajectory()
        try:
            for mode in ("tf32", "ieee"):
                convolutions.fp32_precision = mode
                other = run.trajectory()
                figures[f"loss, {mode}"], figures[f"norm, {mode}"] = _errors(other, expected)
                figures[f"same bits as {mode}"] = not differing(found.tensors, other.tensors)
        finally:
            convolutions.fp32_precision = before
        assert figures["same bits as ieee"], "float32 convolutions are not computed in float32"


def _everything(checks: Checks, device: torch.device) -> None:
    network = "improved_alexnet"
    batch, model = _batch(checks, network), initial_model(network)
    expected = Run(config_of(network, "float64", batch, *_EVERYTHING), _CPU, model=model).trajectory()
    config = config_of(network, fast_precision(device) if checks.tiny else "float16", batch, *_EVERYTHING)
    if run := _built(checks, "all options together", config, device, model=model):
        _check(checks, "all options together", run, expected)


def _exact(checks: Checks, device: torch.device) -> None:
    """Check exact mode against fast mode with the same weights."""
    threads, network = torch.get_num_threads(), "improved_alexnet"
    batch = _batch(checks, network)
    for precision in _float32_and(fast_precision(device)):
        fast = _built(checks, f"fast mode, {precision}", config_of(network, precision, batch), device)
        if fast is None:
            continue
        expected = fast.trajectory()
        for shards in (1, 8):
            name = f"exact mode, {shards} shards, {precision}"
            config = config_of(network, precision, batch, shards=shards)
            if run := _built(checks, name, config, device):
                _check(checks, name, run, expected, reference="fast mode")
        torch.set_num_threads(threads)  # exact mode sets it to one


def _compiled(checks: Checks, device: torch.device) -> None:
    from torch.compiler import config as compiler

    config = config_of("improved_alexnet", "bfloat16", _batch(checks, "improved_alexnet"), "--compile", "true")
    make_deterministic(device, precision="bfloat16", compile=True)
    with checks.check("compiled: two new engines give the same bits") as figures:
        outcomes = []
        for kind in ("first", "second"):
            start = time.monotonic()
            torch.compiler.reset()
            with compiler.patch(force_disable_caches=True):  # type: ignore[attr-defined]  # the second must not reuse choices
                outcomes.append(Run(config, device).trajectory())
            figures[f"seconds, {kind}"] = time.monotonic() - start
        _assert_same(*outcomes)
