"""Which models exact mode supports, and how it names the layers that it does not."""

import pytest
import torch
from torch import nn

from distributed.config.engines import Ddp
from distributed.config.sections import Model, Sgd
from distributed.engine.exact import ExactEngine
from distributed.engine.prepare import Compute
from distributed.exact.supported import check_exact
from distributed.models.build import build_model
from distributed.models.keyed_dropout import KeyedDropout


class Stateful(nn.Module):
    def __init__(self, *, persistent: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(3, dtype=dtype), persistent=persistent)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.MaxPool2d(2),
        nn.Embedding(3, 4),
        nn.PReLU(),
        KeyedDropout(0.5, name="dropout"),
        Stateful(persistent=False),
        Stateful(persistent=True, dtype=torch.int64),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_per_sample_layers_and_batch_norm_are_supported(layer: nn.Module) -> None:
    check_exact(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        *[
            (layer, "draws from a random generator, .*; use KeyedDropout")
            for layer in (
                nn.Dropout(0.5),
                nn.Dropout2d(0.5),
                nn.AlphaDropout(0.5),
                nn.RReLU(),
                nn.FractionalMaxPool2d(2, 3),
            )
        ],
        (Stateful(persistent=True), "has the persistent buffer average"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "has the persistent buffer running_mean"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_random_and_stateful_layers_are_named(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ValueError, match=rf"does not support this model: 1\.1 \({type(layer).__name__}\) {reason}"):
        check_exact(model)


def test_the_engine_names_all_unsupported_layers_at_once() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), Stateful(persistent=True))
    compute = Compute("float32", channels_last=False, device=torch.device("cpu"), timeout_seconds=10)
    with pytest.raises(ValueError, match=r"exact\.shards > 0.*0 \(Dropout\).*; 2 \(Stateful\)"):
        ExactEngine(Ddp(), model, optim=Sgd(), compute=compute, shards=2, workers=1)


def test_the_default_model_is_supported() -> None:
    check_exact(build_model(Model(), num_classes=10, seed=0))
