"""Layers whose weights may be freed outside their own forward."""

import warnings

import torch
import torchvision
from kit.experts import Experts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distributed.exact.shardable_layers import conditional_modules, layers_to_shard

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Plain(nn.Linear):
    pass


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.first = nn.Linear(72, 6)
        self.twice = Plain(6, 6)
        self.shape_only = nn.Linear(6, 6, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.unused = nn.Linear(6, 6)
        self.own_forward = Doubled(6, 6)
        self.tied, self.with_tied = nn.Linear(6, 6), nn.Linear(6, 6)
        self.with_tied.weight = self.tied.weight
        self.read = nn.Linear(6, 6)
        self.read_data = nn.Linear(6, 6)
        self.item = nn.Linear(6, 6)
        self.functional = nn.Linear(6, 6)
        self.table, self.as_embedding = nn.Embedding(6, 6), nn.Linear(6, 6)
        self.as_embedding.weight = self.table.weight
        self.again = nn.Linear(6, 6)
        self.read_in_evaluation, self.twice_in_evaluation = nn.Linear(6, 6), nn.Linear(6, 6)
        self.only_in_training = nn.Linear(6, 6)
        self.attend = nn.MultiheadAttention(6, 2)
        self.wide, self.wide_on_a_gpu = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(self.conv(x).flatten(1))))
        x = self.shape_only(x.to(self.shape_only.weight.dtype).view(-1, self.shape_only.weight.shape[1]))
        x = self.own_forward(self.normed(self.frozen(x)))
        x = self.with_tied(self.tied(x))
        x = self.read(x) + self.read.weight.sum()
        x = self.read_data(x) / self.read_data.weight.data.abs().max()
        x = self.item(x) * float(self.item.bias[0])
        x = F.linear(x, self.functional.weight) + self.functional(x)
        x = self.as_embedding(x) + self.table(torch.zeros(len(x), dtype=torch.int64))
        x = self.twice_in_evaluation(self.read_in_evaluation(x))
        if not self.training:
            x = self.twice_in_evaluation(x) * self.read_in_evaluation.weight.mean()
        x = self.only_in_training(x) if self.training else x
        x = checkpoint(self.again, x, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            x = self.wide(x)
        with torch.amp.autocast_mode.autocast("cuda", enabled=False):
            x = self.wide_on_a_gpu(x)
        return x + self.attend(x[:, None], x[:, None], x[:, None])[0][:, 0]


def test_layers_that_alone_use_their_parameters() -> None:
    expected = {"conv": 1, "first": 1, "twice": 2, "shape_only": 1, "frozen": 1, "normed": 1, "only_in_training": 1}
    assert layers_to_shard(Network(), IMAGES) == expected


def test_checkpointing_networks_get_no_warning() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        layers_to_shard(Network(), IMAGES)
    assert [str(each.message) for each in found if "autocast" in str(each.message).lower()] == []


def test_all_layers_of_a_residual_network() -> None:
    model = torchvision.models.resnet18()
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers_to_shard(model, IMAGES) == dict.fromkeys(layers, 1)


def test_attention_keeps_its_output_projection() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=5
    )
    block = "encoder.layers.encoder_layer_0.mlp"
    assert layers_to_shard(model, IMAGES) == {"conv_proj": 1, f"{block}.0": 1, f"{block}.3": 1, "heads.head": 1}


def test_layers_that_only_some_images_use() -> None:
    """A rank whose images use no such layer would not take part in gathering its weights."""
    model = Experts(10)
    found = conditional_modules(model, IMAGES)
    assert found
    assert found <= {f"experts.{index}.0" for index in range(4)}
    assert layers_to_shard(model, IMAGES, found) == {"conv": 1, "router": 1, "head": 1}
    assert not conditional_modules(torchvision.models.resnet18(), IMAGES)
