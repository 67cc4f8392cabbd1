"""Checks updates for the step `units`: optimizers, EMA and loss scale."""

import torch
from torch import Tensor

from distributed.config.optim import AdamW, AnyOptim, Muon, Sgd
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.differences import differing, error
from distributed.optim.ema import WeightEMA
from distributed.optim.loss_scale import GROWTH_INTERVAL, PREFIX, LossScale
from distributed.optim.optimizer import Optimizer

_SHAPES = ((64, 32, 3, 3), (65,), (70, 33), ())
_OPTIMIZERS: dict[str, AnyOptim] = {
    "sgd": Sgd(),
    "sgd without momentum": Sgd(momentum=0.0, nesterov=False),
    "adamw": AdamW(decay_norm_and_bias=True),
    "muon": Muon(),
}
_BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-12}
_BFLOAT16_BOUND = 5e-3
"""Of Muon, whose products are checked in bfloat16 with float32 weights."""


def run(checks: Checks) -> None:
    """Compare updates on the device with those in float64 on the CPU."""
    for name in _OPTIMIZERS:
        _optimizer(checks, name)
    _ema(checks)
    _loss_scale(checks)


def _tensors(seed: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return random tensors, the same numbers for any dtype and device, filters in channels_last."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in _SHAPES]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]


def _updated(
    name: str, device: torch.device, dtype: torch.dtype, skips: list[float | None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take one step per element of `skips`. Return weights and optimizer tensors after the last step, and before it."""
    low = torch.bfloat16 if dtype == torch.float32 else None
    optimizer = Optimizer(_OPTIMIZERS[name], _tensors(0, device, dtype), muon_dtype=low)
    before: dict[str, Tensor] = {}
    for step, skip in enumerate(skips):
        before = {path: tensor.clone() for path, tensor in _tensors_of(optimizer).items()}
        for parameter, gradient in zip(optimizer.parameters, _tensors(step + 1, device, dtype), strict=True):
            parameter.grad = gradient
        optimizer.step(0.05, skip=None if skip is None else torch.tensor(skip, device=device))
        optimizer.zero_grad()
    return _tensors_of(optimizer), before


def _tensors_of(optimizer: Optimizer) -> dict[str, Tensor]:
    found = {f"weight {index}": p for index, p in enumerate(optimizer.parameters)}
    for index, p in enumerate(optimizer.parameters):
        found |= {f"{key} {index}": tensor for key, tensor in optimizer.state.get(p, {}).items()}
    return found


def _optimizer(checks: Checks, name: str) -> None:
    with checks.check(f"{name} is close to float64 on the CPU") as figures:
        for dtype, bound in _BOUNDS.items():
            bound = _BFLOAT16_BOUND if name == "muon" and dtype == torch.float32 else bound
            for variant, skips in (("plain", [None] * 5), ("with skip", [0.0] * 5)):
                found, _ = _updated(name, checks.device, dtype, list(skips))
                expected, _ = _updated(name, torch.device("cpu"), torch.float64, [None] * 5)
                worst = max(error(found[path], expected[path]) for path in expected)
                figures[f"{str(dtype).removeprefix('torch.')} {variant}"] = worst
                assert worst < bound, f"bound {bound}"
    with checks.check(f"{name}: a skipped step changes nothing"):
        after, before = _updated(name, checks.device, torch.float32, [0.0, 0.0, 1.0])
        different = differing(after, before)
        assert not different, different


def _ema(checks: Checks) -> None:
    with checks.check("EMA weights are close to float64 on the CPU") as figures:
        outcomes = []
        for device, dtype in ((checks.device, torch.float32), (torch.device("cpu"), torch.float64)):
            live = {str(index): tensor for index, tensor in enumerate(_tensors(0, device, dtype))}
            ema = WeightEMA(live, decay=0.9)
            for step, skip in enumerate((None, 0.0, 1.0, None)):
                for tensor, new in zip(live.values(), _tensors(step + 1, device, dtype), strict=True):
                    tensor.copy_(new)
                ema.update(step, skip=None if skip is None else torch.tensor(skip, device=device))
            outcomes.append(ema.tensors)
            weights = {name: tensor.clone() for name, tensor in live.items()}
            with ema.in_place():
                assert not differing(live, ema.tensors), "in place"
            assert not differing(live, weights), "put back"
        found, expected = outcomes
        figures["error"] = max(error(found[name], expected[name]) for name in expected)
        assert figures["error"] < 1e-6


def _loss_scale(checks: Checks) -> None:
    with checks.check("the loss scale equals the CPU's"):
        histories = []
        for device in (checks.device, torch.device("cpu")):
            scale = LossScale(device)
            scale.load(
                {f"{PREFIX}scale": torch.tensor(1024.0), f"{PREFIX}good_steps": torch.tensor(GROWTH_INTERVAL - 2)}
            )
            history = []
            for overflow in (0.0, 0.0, 0.0, 1.0, 1.0, 0.0):
                scale.update(torch.tensor(overflow, device=device))
                history.append([float(tensor) for _, tensor in scale.state()])
            histories.append(history)
        assert histories[0] == histories[1], histories
        assert [scale for scale, _ in histories[0]] == [1024.0, 2048.0, 2048.0, 1024.0, 512.0, 512.0]
