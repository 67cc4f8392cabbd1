"""Networks other than the project's own, shrunk to images of 32 x 32 where needed, and short exact-mode runs of them.

Used by import path: `model.name = "kit.networks:FACTORY"` or "torchvision.models:FACTORY".
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.engine.protocol import Engine
from distributed.network import Network, build_network
from distributed.topology import Topology
from distributed.training.losses import CROSS_ENTROPY, build_losses
from distributed.training.steps import evaluate, train_step
from distributed.training.totals import Totals, TotalsAccumulator
from distributed.training.views import Views
from kit.small_runs import FAST, small_config
from kit.traces import digest_of

NETWORKS = {
    "resnet18": "torchvision.models:resnet18",
    "resnet50": "torchvision.models:resnet50",
    "densenet121": "torchvision.models:densenet121",
    "mobilenet_v3_small": "torchvision.models:mobilenet_v3_small",
    "efficientnet_b0": "torchvision.models:efficientnet_b0",
    "convnext_tiny": "kit.networks:convnext_tiny",
    "vit_b_16": "kit.networks:vit_b_16",
    "lstm": "kit.networks:RowsLSTM",
}
"""Import paths by name. All but the first three drop units or blocks at random."""

EVEN, UNEVEN, LARGE = "even shards", "uneven and empty shards", "large batches"
CASES: dict[str, dict[str, Any]] = {
    EVEN: {"global_batch_size": 8, "data": {"train_samples": 24, "test_samples": 10}},
    # Two steps of 5 + 6 images, so shards of one and two; then one of 2 + 3 images, with empty shards.
    UNEVEN: {"global_batch_size": 11, "grad_accum_steps": 2, "data": {"train_samples": 27, "test_samples": 10}},
}
"""Three steps an epoch. Gradients are clipped: batch norm of so few images with one pixel each makes them large."""
_LARGE = {"global_batch_size": 24, "data": {"train_samples": 48, "test_samples": 10}}
"""For comparisons of roundings, which batch norm of 8 images magnifies by 1e4 in resnet50."""
_built: dict[tuple[str, bool], Network] = {}
"""This process's networks by name and whether in exact mode: building and checking them takes longer than a run."""
SHARDS = 4
CLIP = 0.1


def convnext_tiny(num_classes: int, *, blocks: Sequence[int] = (1, 1, 2, 1), width: int = 24) -> nn.Module:
    """ConvNeXt-T with fewer and narrower blocks (96 channels in the original), and more stochastic depth."""
    widths = [width << stage for stage in range(len(blocks))]
    stages = [
        CNBlockConfig(channels, following, layers)
        for channels, following, layers in zip(widths, [*widths[1:], None], blocks, strict=True)
    ]
    return ConvNeXt(stages, stochastic_depth_prob=0.3, num_classes=num_classes)


def vit_b_16(num_classes: int, *, image_size: int = 32, layers: int = 2, width: int = 48) -> nn.Module:
    """ViT-B/16 with smaller patches and fewer, narrower layers, and with dropout. That of the attention is functional: 0."""
    return VisionTransformer(
        image_size=image_size,
        patch_size=8,
        num_layers=layers,
        num_heads=4,
        hidden_dim=width,
        mlp_dim=4 * width,
        dropout=0.1,
        num_classes=num_classes,
    )


class RowsLSTM(nn.Module):
    """Reads the rows of an image [n, 3, side, side] from top to bottom; the last state gives the logits."""

    def __init__(self, num_classes: int, *, side: int = 32, width: int = 48) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3 * side, width, num_layers=2, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(0, 2, 1, 3).flatten(2)
        states: Tensor = self.lstm(rows)[0]
        logits: Tensor = self.head(self.dropout(states[:, -1]))
        return logits


def network_config(network: str, run_dir: Path, *, case: str, **settings: Any) -> TrainConfig:
    """Return the config of a network's run in one of CASES, in exact mode unless `settings` say otherwise."""
    optim = {"lr": 0.02, "max_grad_norm": CLIP}
    values = {"model": {"name": NETWORKS[network]}, "optim": optim, "exact": {"shards": SHARDS}, "epochs": 1}
    return small_config(run_dir, **(values | (CASES | {LARGE: _LARGE})[case] | settings))


class Outcome(NamedTuple):
    """What one epoch computed: equal on all ranks and, in exact mode, at every world size."""

    norms: list[float]
    """The gradient's norm at each step, before clipping."""
    train: list[Totals]
    """Totals of each step."""
    test: Totals
    tensors: dict[str, str]
    """Digests of the final state, by name."""


def run_epoch(config: TrainConfig) -> Outcome:
    """Train for one epoch inside a process group, without a run folder, and evaluate."""
    engine, norms, train, test = _epoch(config)
    return Outcome(norms, train, test, {name: digest_of(tensor) for name, tensor in engine.state()})


def fast_deviation(network: str) -> float:
    """Return the largest relative deviation of fast from exact mode after two steps in float64, with equal dropout masks."""
    engines, norms = [], []
    for exact in ({"shards": SHARDS}, FAST):
        config = network_config(network, Path("unused"), case=LARGE, precision="float64", exact=exact)
        engine, own_norms, _, _ = _epoch(config)
        engines.append(dict(engine.state()))
        norms.append(torch.tensor(own_norms, dtype=torch.float64))
    expected, found = engines
    assert expected.keys() == found.keys()
    deviations = [float((norms[1] / norms[0] - 1).abs().max())]
    for name, tensor in expected.items():
        # The gradient of a bias before a batch norm is rounding error only.
        scale = max(1e-3, float(tensor.abs().max()))
        deviations.append(float((found[name] - tensor).abs().max()) / scale)
    return max(deviations)


def _epoch(config: TrainConfig) -> tuple[Engine, list[float], list[Totals], Totals]:
    topology, device = Topology(collectives.rank(), collectives.world_size()), torch.device("cpu")
    data = build_data(config, topology, device)
    key = config.model.name, bool(config.shards_on("cpu"))
    if key not in _built:
        _built[key] = build_network(config, topology, data)
    engine = build_engine(config, topology, data, device, copy.deepcopy(_built[key]))
    sums, norms, train = TotalsAccumulator(device), list[float](), list[Totals]()
    for step, micro_batches in enumerate(data.train_epoch(0)):
        norm = train_step(
            engine, micro_batches, loss=build_losses(config.loss).training, lr=config.optim.lr, step=step, totals=sums
        )
        norms.append(float(norm))
        train.append(sums.read())
    return engine, norms, train, evaluate(engine, data, "test", loss=CROSS_ENTROPY, views=Views(), device=device)


class BiasesOnly(nn.Module):
    """Trains biases only. The input of `mix` is not contiguous, so its bias is added in an operation of its own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pixels, self.mix, self.head = nn.Linear(1024, 8), nn.Linear(3, 3), nn.Linear(24, num_classes)
        for layer in (self.pixels, self.mix, self.head):
            layer.weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pixels(images.flatten(2)).relu()
        logits: Tensor = self.head(self.mix(x.transpose(1, 2)).relu().flatten(1))
        return logits
