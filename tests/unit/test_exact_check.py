import pytest
import torch
from torch import nn

from distributed.config.engines import Ddp
from distributed.config.sections import Model, Sgd
from distributed.engine.exact import ExactEngine
from distributed.exact.supported import check_exact
from distributed.models.build import build_model
from distributed.models.keyed_dropout import KeyedDropout


class Remembering(nn.Module):
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
        KeyedDropout(0.5, features=4, name="dropout"),
        Remembering(persistent=False),
        Remembering(persistent=True, dtype=torch.int64),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_look_at_one_sample_and_batch_norm_will_do(layer: nn.Module) -> None:
    check_exact(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        *[
            (layer, "draws from a generator, .*; use KeyedDropout")
            for layer in (
                nn.Dropout(0.5),
                nn.Dropout2d(0.5),
                nn.AlphaDropout(0.5),
                nn.RReLU(),
                nn.FractionalMaxPool2d(2, 3),
            )
        ],
        (Remembering(persistent=True), "keeps average from batch to batch"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "keeps running_mean from batch to batch"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_that_draws_or_remembers_is_refused_by_its_name_in_the_model(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ValueError, match=rf"cannot compute this model: 1\.1 \({type(layer).__name__}\) {reason}"):
        check_exact(model)


def test_all_of_them_are_told_at_once_and_by_the_engine_too() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), Remembering(persistent=True))
    with pytest.raises(ValueError, match=r"exact\.shards > 0.*0 \(Dropout\).*; 2 \(Remembering\)"):
        ExactEngine(
            Ddp(), model, optim=Sgd(), precision="float32", channels_last=False, device=torch.device("cpu"), shards=2,
            lanes=1, timeout_seconds=10,
        )  # fmt: skip


def test_our_models_will_do() -> None:
    check_exact(build_model(Model(), num_classes=10, seed=0))
