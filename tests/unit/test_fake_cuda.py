"""A training step copies nothing from pageable host memory to a GPU and never waits for it: audited without a GPU.

Tensors are fake: operations are dispatched, but nothing is computed. Their device is `cpu:0`, which torch distinguishes from
`cpu`; it stands in for the GPU. Fake tensors on `cuda` have no backward pass without a driver, since autograd queries streams.
"""

import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed import build
from distributed.config import from_command_line
from distributed.data import pipeline
from distributed.data.batch import Batch
from distributed.engine import exact, prepare
from distributed.engine.prepare import Compute
from distributed.exact import gather_statistics
from distributed.exact.torch_compat import python_nodes_are_weak
from distributed.inference.confusion import ConfusionMatrix
from distributed.models import build as models
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

ROOT = Path(build.__file__).parent
DEVICE, HOST = torch.device("cpu:0"), torch.device("cpu")
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
aten = torch.ops.aten

FROM_HOST = {aten.lift_fresh}  # `torch.tensor`, or a list as an index: numbers in pageable memory
WAITS = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.bincount, aten.histc,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Audit(TorchDispatchMode):
    """Collects operations that copy from the host or wait for the device, with the project's line that runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operations: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # `.device` of a fake tensor
            return func(*args)
        self.operations[func.overloadpacket] += 1
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if complaint := _complaint(func.overloadpacket, inputs):
            self.found[f"{_line_of_project()}: {func}: {complaint}"] += 1
        if func in (aten._fused_sgd_.default, aten.batch_norm_update_stats.default):
            return _without_data(func, *args)
        result = func(*args, **(kwargs or {}))
        if inputs and any(_elsewhere(x) for x in tree_leaves(result)):
            self.found[f"{_line_of_project()}: {func}: returns a tensor on the host"] += 1
        return result

    def assert_nothing_found(self) -> None:
        if self.found:
            pytest.fail("\n".join(f"{count} x {line}" for line, count in self.found.items()), pytrace=False)


def _complaint(operation: Any, inputs: list[Tensor]) -> str | None:
    if operation in FROM_HOST:
        return "created from values on the host"
    if operation in WAITS:
        return "waits for the device"
    if operation in INDEXING and any(x.dtype == torch.bool for x in inputs[1:]):
        return "a boolean index is counted on the host"
    if any(map(_elsewhere, inputs)):
        return "reads a tensor on the host"
    return None


def _elsewhere(x: object) -> bool:
    return isinstance(x, Tensor) and x.device != DEVICE


def _without_data(func: Any, *args: Any) -> Any:
    """Return results for two operations that fake tensors do not support: an in-place update, and a batch's statistics."""
    return None if func is aten._fused_sgd_.default else (torch.empty_like(args[1]), torch.empty_like(args[2]))


def _line_of_project() -> str:
    for frame in reversed(traceback.extract_stack()):
        if ROOT in Path(frame.filename).parents:
            return f"{Path(frame.filename).relative_to(ROOT.parent)}:{frame.lineno}"
    return "outside the project"


def _cast(model: nn.Module, compute: Compute) -> nn.Module:
    """Move a model to a device; `Module.to` rejects fake parameters."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(compute.device)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=compute.device))
    return model


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    for module in (prepare, exact):
        monkeypatch.setattr(module, "cast", _cast)
    monkeypatch.setattr(models, "initialize", lambda model, **_: None)  # it takes thousands of operations
    # The split, and a choice of its images, are computed by torch and read by numpy, which cannot read fake tensors.
    monkeypatch.setattr(pipeline, "validation_mask", lambda labels, **_: np.zeros(len(labels), np.bool_))
    monkeypatch.setattr(pipeline, "spread", lambda size, count: np.arange(min(size, count)))
    return FAKE


def audited_step(*arguments: str) -> Audit:
    images = "--data.name generated10 --data.train_samples 20 --data.test_samples 10 --data.placement device"
    config = from_command_line([*f"{images} --threads 1 --global_batch_size 20".split(), *arguments]).config
    data = build.build_data(config, Topology(), DEVICE)
    data.example()  # creates what is cached per device
    python_nodes_are_weak()  # cached too
    engine = build.build_engine(config, Topology(), data, DEVICE)
    sums = TotalsAccumulator(DEVICE)
    audit, batches = Audit(), data.train_epoch(0)
    with audit:
        train_step(engine, next(batches), loss=build_losses(config.loss).training, lr=0.1, step=0, totals=sums)
    return audit


ALL = (
    "--data.augment.mixup 0.4 --data.augment.cutmix 1 --data.augment.cutout 8 --loss.label_smoothing 0.1 "
    "--optim.ema_decay 0.9 --optim.max_grad_norm 1"
)
RECIPE = (
    "--data.augment.crop_padding reflect --data.augment.flip alternating --loss.label_smoothing 0.2 "
    "--optim.bias_lr_factor 4"
)
FAST = ("alexnet sgd", "improved_alexnet adamw", "cifar_alexnet adamw", "cifar_alexnet_bn sgd")
CASES = [
    *(f"{case} {precision} 0 {ALL}" for case in FAST for precision in ("float32", "bfloat16", "float16")),
    "improved_alexnet sgd float32 0",
    f"improved_alexnet sgd float16 0 {ALL} --grad_accum_steps 2",
    f"alexnet adamw float32 1 {ALL}",
    f"improved_alexnet adamw float16 8 {ALL}",  # shards of two and of three images
    f"cifar_alexnet sgd bfloat16 1 {ALL}",
    *(f"fast_alexnet muon bfloat16 {shards} {RECIPE}" for shards in (0, 8)),
    f"fast_alexnet sgd float32 0 {RECIPE}",
]


# torch warns about data pointers of fake tensors, by which exact mode caches its views.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("case", CASES, ids=[" ".join(case.split()[:4]) for case in CASES])
def test_a_step_neither_copies_from_the_host_nor_waits(case: str, fake: FakeTensorMode) -> None:
    model, optim, precision, shards, *options = case.split()
    with fake:
        audit = audited_step(
            "--model.name", model, "--optim.name", optim, "--precision", precision, "--exact.shards", shards, *options
        )
    audit.assert_nothing_found()
    assert audit.operations[aten.convolution_backward] >= 5, "the backward pass was not audited"
    assert audit.operations[aten._fused_sgd_] + audit.operations[aten._fused_adamw_] > 0, "the update was not audited"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_statistics_rows_are_assembled_on_the_device(
    world_size: int, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_statistics, "world_size", lambda: world_size)
    with fake:
        gather_rows = gather_statistics.StatisticsGather(
            lambda sent: sent.new_empty(world_size, sent.numel()), shards=8
        )
        own = [torch.zeros(5, device=DEVICE) for _ in range(8 // world_size)]
        audit = Audit()
        with audit:
            assert gather_rows(own).shape == (8, 5)
    audit.assert_nothing_found()


def test_counting_confusions_does_not_wait(fake: FakeTensorMode) -> None:
    with fake:
        labels, logits = torch.zeros(8, dtype=torch.int64, device=DEVICE), torch.zeros(8, 10, device=DEVICE)
        sums = ConfusionMatrix(10, DEVICE)
        audit = Audit()
        with audit:
            sums(logits, Batch(logits, labels, labels, labels, 8, (8,)))
    audit.assert_nothing_found()


@pytest.mark.parametrize(
    ("defect", "complaint"),
    [
        (lambda x: torch.tensor(3, device=DEVICE), "created from values on the host"),
        (lambda x: x[[0, 1]], "created from values on the host"),
        (lambda x: x + torch.zeros(4, device=HOST).to(DEVICE), "reads a tensor on the host"),
        (lambda x: x * torch.ones((), device=HOST), "reads a tensor on the host"),
        (lambda x: x.cpu(), "returns a tensor on the host"),
        (lambda x: x.sum().item(), "waits for the device"),
        (lambda x: bool(x.isfinite().all()), "waits for the device"),
        (lambda x: x[x > 0], "a boolean index"),
        (lambda x: x.nonzero(), "waits for the device"),
    ],
    ids=["torch.tensor", "list as index", "copy", "scalar on the host", "cpu", "item", "bool", "mask", "nonzero"],
)
def test_audit_finds_each_kind_of_defect(defect: Any, complaint: str) -> None:
    audit = Audit()
    with FAKE:
        x = torch.zeros(4, device=DEVICE)
        with suppress(Exception), audit:  # reading a value raises, since fake tensors have none
            defect(x)
    assert any(complaint in line for line in audit.found), audit.found
