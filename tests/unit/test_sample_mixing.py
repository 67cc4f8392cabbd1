"""Networks in which the output for one image depends on others are found, and the module is named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distributed.exact.check.supported import check_exact, mixes_samples
from distributed.models.convert_dropout import convert_dropout

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
_calls = iter(range(1, 10**6))


class Mixer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BatchNormOfAnotherBase(nn.Module):
    """Batch norm by the functional interface, which no engine synchronizes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=self.training)


class OnlyInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True) if self.training else x


class AttentionOverTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*[x[:, None]] * 3)[0][:, 0]


class Branch(nn.Module):
    """A branch whose output is multiplied by zero until it is trained, or a residual connection around it."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.full((12,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


def around(layer: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Sequential(convert_dropout(nn.Sequential(nn.Dropout(0.2))), layer),
        nn.BatchNorm1d(12, track_running_stats=False),
        nn.Linear(12, 5),
    )


class Experts(nn.Module):
    """Sends each sample to one of two layers, in batches of sizes that depend on the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.experts = nn.Linear(12, 2), nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.choice(x).argmax(1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index])
        return y


def replaced_by_best(x: Tensor) -> Tensor:
    return x + x[x.detach().sum(1).argmax()]


MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean subtraction": lambda x: x - x.mean(0),
    "a tiny share of the mean": lambda x: x + 1e-12 * x.mean(0),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(0).values,
    "softmax": lambda x: x.softmax(0),
    "shift": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0),
    "the maximum of all": lambda x: x / x.abs().max(),
    "rank, without a gradient": lambda x: x + x.detach().argsort(0).argsort(0),
    "rounded mean, without a gradient": lambda x: x + (4 * x.detach().mean()).round(),
    "another sample's features": replaced_by_best,
    "mixing rows": lambda x: x.t().reshape(len(x), -1),
    "a pair": lambda x: torch.cat([x[:1] + x[-1:], x[1:]]),
}


@pytest.mark.parametrize("name", MIXERS)
def test_functions_of_several_samples_are_refused(name: str) -> None:
    model = around(Mixer(MIXERS[name]))
    with pytest.raises(ValueError, match=r"mixes the samples of a batch.*; compute it for each sample alone") as error:
        check_exact(model, IMAGES)
    assert str(error.value).startswith("exact.shards > 0: 5.1 (Mixer): mixes")


@pytest.mark.parametrize(
    ("layer", "path"),
    [
        (BatchNormOfAnotherBase(), r"5\.1 \(BatchNormOfAnotherBase\)"),
        (OnlyInTraining(), r"5\.1 \(OnlyInTraining\)"),
        (AttentionOverTheBatch(), r"5\.1"),
        (Branch(OnlyInTraining(), 1.0), r"5\.1\.inner \(OnlyInTraining\)"),
        (Branch(OnlyInTraining(), 0.0), r"5\.1\.inner \(OnlyInTraining\)"),
        (nn.LSTM(12, 12), r"5\.1 \(LSTM\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_mix_samples_are_refused(layer: nn.Module, path: str) -> None:
    model = around(nn.Sequential(layer, Mixer(lambda x: x[0])) if isinstance(layer, nn.LSTM) else layer)
    path = path.replace("5\\.1 ", "5\\.1\\.0 ") if isinstance(layer, nn.LSTM) else path
    with pytest.raises(ValueError, match=f"{path}.*: mixes the samples of a batch"):
        check_exact(model, IMAGES)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_images_will_do(count: int) -> None:
    assert "5.1 (Mixer): mixes the samples" in mixes_samples(around(Mixer(lambda x: x - x.mean(0))), IMAGES[:count])
    assert mixes_samples(around(nn.Identity()), IMAGES[:count]) == ""


def test_equal_images_show_mixing_too() -> None:
    assert "mixes" in mixes_samples(around(Mixer(lambda x: x - x.mean(0))), IMAGES[:1].expand(3, -1, -1, -1))


def test_models_in_evaluation_mode_are_checked_as_trained() -> None:
    model = around(OnlyInTraining()).eval()
    assert "5.1 (OnlyInTraining): mixes" in mixes_samples(model, IMAGES)
    with pytest.raises(ValueError, match=r"5\.1 \(OnlyInTraining\): mixes"):
        check_exact(model, IMAGES)
    assert not any(module.training for module in model.modules())


def deep(layer: nn.Module, *, gain: float) -> nn.Module:
    """Return 50 layers without normalization, whose activations overflow or vanish, and the layer in their middle."""
    torch.manual_seed(4)
    layers = [nn.Linear(192, 192, bias=False) for _ in range(50)]
    for linear in layers:
        linear.weight.data.mul_(gain)
    return nn.Sequential(nn.Flatten(), *layers[:25], layer, *layers[25:], nn.Linear(192, 5))


@pytest.mark.parametrize("gain", [0.02, 1.0, 50.0])
def test_extreme_activations_are_not_mixing(gain: float) -> None:
    assert mixes_samples(deep(nn.ReLU(), gain=gain), IMAGES) == ""


def test_mixing_in_the_middle_of_a_deep_network() -> None:
    assert "26 (Mixer)" in mixes_samples(deep(Mixer(lambda x: x - x.mean(0)), gain=1.0), IMAGES)


def test_a_head_of_zeros_does_not_mislead() -> None:
    model = around(Mixer(lambda x: x.cumsum(0)))
    nn.init.zeros_(model[-1].weight)
    assert "5.1 (Mixer)" in mixes_samples(model, IMAGES)


def test_infinite_logits_do_not_mislead() -> None:
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0])
    assert mixes_samples(nn.Sequential(around(nn.Identity()), Mixer(lambda x: x + mask)), IMAGES) == ""
    model = nn.Sequential(around(Mixer(lambda x: x - x.mean(0))), Mixer(lambda x: x + mask))
    assert "0.5.1 (Mixer)" in mixes_samples(model, IMAGES)


def test_experts_do_not_mix_samples() -> None:
    assert mixes_samples(around(Experts()), IMAGES) == ""


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_hides_nothing(reentrant: bool) -> None:
    dropout = convert_dropout(nn.Sequential(nn.Dropout(0.2)))
    for inner, found in ((nn.Tanh(), False), (Mixer(lambda x: x + 1e-12 * x.mean(0)), True)):
        body = nn.Sequential(nn.Linear(12, 12), inner, dropout)
        layer = Mixer(lambda x, body=body: checkpoint(body, x, use_reentrant=reentrant))
        layer.body = body
        assert ("mixes" in mixes_samples(around(layer), IMAGES)) == found


def test_infinite_gradients_are_not_mixing() -> None:
    assert mixes_samples(around(Mixer(lambda x: x + (x.relu() * 0).sqrt())), IMAGES) == ""


def test_hidden_state_is_not_taken_for_mixing() -> None:
    model = around(Mixer(lambda x: x * next(_calls)))
    assert mixes_samples(model, IMAGES) == ""
    assert "mixes" in mixes_samples(around(Mixer(lambda x: x.cumsum(0) * next(_calls))), IMAGES)
    with pytest.raises(ValueError, match=r"5\.1 \(Mixer\): does not repeat itself"):
        check_exact(model, IMAGES)


def test_draws_and_state_are_not_taken_for_mixing() -> None:
    assert mixes_samples(around(nn.Dropout(0.5)), IMAGES) == ""
    assert mixes_samples(around(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12))), IMAGES) == ""
    assert mixes_samples(around(nn.LazyLinear(12)), IMAGES) == ""
