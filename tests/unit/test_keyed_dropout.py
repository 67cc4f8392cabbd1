"""Dropout computed from sample keys, by the definition of each kind."""

import copy
from concurrent.futures import ThreadPoolExecutor

import greenlet
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from distributed import rng
from distributed.errors import InputError
from distributed.models.convert_dropout import convert_dropout
from distributed.models.keyed_dropout import KeyedAlphaDropout, KeyedDropout, use_sample_keys


def keys_of(count: int) -> Tensor:
    return rng.sample_keys(torch.arange(count), seed=0, epoch=0)


def applied(layer: nn.Module, x: Tensor, keys: Tensor | None = None) -> Tensor:
    with use_sample_keys(keys_of(len(x)) if keys is None else keys):
        return layer(x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_a_fraction_p_and_keeps_the_mean(p: float) -> None:
    out = applied(KeyedDropout(p, name="a"), torch.ones(1000, 200))
    dropped = float((out == 0).double().mean())
    deviation = (p * (1 - p) / 200_000) ** 0.5
    assert abs(dropped - p) < 4 * deviation
    assert abs(float(out.double().mean()) - 1) < 4 * deviation / (1 - p)


@pytest.mark.parametrize("per", ["channel", "sample"])
def test_larger_units_keep_the_mean_too(per: str) -> None:
    out = applied(KeyedDropout(0.25, name="a", per=per), torch.ones(4000, 6, 2, 3))
    units = out[:, :, 0, 0] if per == "channel" else out[:, 0, 0, 0]
    assert torch.equal(out, units.view(4000, -1, 1, 1).expand_as(out))
    assert set(units.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert abs(float((units == 0).double().mean()) - 0.25) < 4 * (0.25 * 0.75 / units.numel()) ** 0.5


@pytest.mark.parametrize("per", ["element", "channel"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_keeps_mean_and_variance(p: float, per: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 300, 2, generator=generator, dtype=torch.float64)
    layer = KeyedAlphaDropout(p, name="a", per=per)
    out = applied(layer, x)
    assert abs(float(out.mean())) < 0.01
    assert abs(float(out.var()) - 1) < 0.02
    dropped = out == layer.offset
    assert abs(float(dropped.double().mean()) - p) < 0.005
    assert per == "element" or torch.equal(dropped[..., 0], dropped[..., 1])


@pytest.mark.parametrize("p", [0.25, 0.75])
def test_alpha_dropout_has_the_two_values_of_torchs(p: float) -> None:
    x = torch.full((40, 50), 0.5, dtype=torch.float64)
    found = applied(KeyedAlphaDropout(p, name="a"), x).unique()
    assert torch.allclose(found, nn.AlphaDropout(p)(x).unique(), rtol=1e-14)


def test_kept_units_are_scaled_up() -> None:
    out = applied(KeyedDropout(0.75, name="a"), torch.ones(20, 50))
    assert set(out.unique().tolist()) == {0.0, 4.0}


def test_units_may_keep_their_scale() -> None:
    out = applied(KeyedDropout(0.75, name="a", per="sample", scaled=False), torch.ones(50, 2))
    assert set(out.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("layer", [KeyedDropout(0.5, name="a").eval(), KeyedDropout(0.0, name="a")])
def test_evaluation_and_p_zero_need_no_keys(layer: nn.Module) -> None:
    x = torch.randn(3, 5)
    assert layer(x) is x


@pytest.mark.parametrize("kind", [KeyedDropout, KeyedAlphaDropout])
def test_probability_one_gives_zeros(kind: type[KeyedDropout]) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    out = kind(1.0, name="a")(x)
    assert torch.equal(out, torch.zeros(3, 5))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 5))


def test_probability_close_to_one_stays_finite() -> None:
    assert applied(KeyedDropout(0.9999999, name="a"), torch.ones(500, 400)).isfinite().all()


def test_training_without_keys_is_an_error() -> None:
    layer = KeyedDropout(0.5, name="block.drop", replaces="DropPath")
    with use_sample_keys(keys_of(3)):
        pass
    with pytest.raises(ValueError, match=r"block\.drop \(DropPath\): training needs the keys of its samples"):
        layer(torch.ones(3, 5))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (
            KeyedDropout(0.5, name="a.b"),
            (7, 3),
            r"a\.b \(Dropout\): an input of shape \[7, 3\] for 3 samples.*batch_first",
        ),
        (KeyedDropout(0.5, name="a"), (), r"shape \[\] has no batch dimension.*at least 1 dimension"),
        (KeyedDropout(0.5, name="a", per="channel"), (3,), r"shape \[3\] has no .*at least 2 dimensions"),
        (KeyedDropout(0.5, name="a", per="channel", dims=3), (3, 4), r"pass 3 dimensions"),
    ],
)
def test_inputs_without_samples_first_are_errors(layer: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message), use_sample_keys(keys_of(3)):
        layer(torch.ones(shape))


@pytest.mark.parametrize("kind", [KeyedDropout, KeyedAlphaDropout])
@pytest.mark.parametrize("per", ["element", "channel"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_flows_through_kept_units_only(kind: type[KeyedDropout], per: str, inplace: bool) -> None:
    layer = kind(0.5, name="a", per=per, inplace=inplace)
    x = torch.randn(10, 30, 2, requires_grad=True)
    applied(layer, x * 1).sum().backward()
    count = 60 if per == "element" else 30
    kept = layer.kept(keys_of(10), count).view(10, 30, -1)
    assert torch.equal(x.grad, (kept * layer.scale).expand(10, 30, 2).float())


@pytest.mark.parametrize("kind", [KeyedDropout, KeyedAlphaDropout])
@pytest.mark.parametrize("per", ["element", "channel"])
def test_in_place_gives_the_same_values(kind: type[KeyedDropout], per: str) -> None:
    x = torch.randn(6, 7, 3)
    expected = applied(kind(0.4, name="a", per=per), x)
    assert not torch.equal(x, expected)
    assert applied(kind(0.4, name="a", per=per, inplace=True), x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(30,), (3, 5, 2), ()])
@pytest.mark.parametrize("per", ["element", "channel", "sample"])
def test_a_sample_has_the_same_mask_in_any_batch(shape: tuple[int, ...], per: str) -> None:
    if per == "channel" and not shape:
        shape = (1,)
    layer, x, keys = KeyedDropout(0.5, name="a", per=per), torch.ones(40, *shape), keys_of(40)
    parts = [applied(layer, x[part], keys[part]) for part in (slice(0, 7), slice(7, 7), slice(7, 40))]
    assert torch.equal(applied(layer, x, keys), torch.cat(parts))


def test_the_memory_layout_does_not_change_the_mask() -> None:
    x = torch.randn(4, 3, 5, 5)
    for per in ("element", "channel"):
        layer = KeyedDropout(0.5, name="a", per=per)
        out = applied(layer, x.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, applied(layer, x))


def test_a_repeated_call_draws_another_mask() -> None:
    layer, x = KeyedDropout(0.5, name="a"), torch.ones(50, 40)
    with use_sample_keys(keys_of(50)):
        first, second, third = layer(x), layer(x), layer(x)
    for one, other in ((first, second), (first, third), (second, third)):
        assert abs(float((one == other).double().mean()) - 0.5) < 4 * 0.5 / 2000**0.5
    with use_sample_keys(keys_of(50)):
        assert torch.equal(layer(x), first)
        assert torch.equal(layer(x), second)


def test_contexts_may_be_nested() -> None:
    layer, x = KeyedDropout(0.5, name="a"), torch.ones(20, 10)
    expected = applied(layer, x)
    with use_sample_keys(keys_of(20)):
        inner = applied(layer, x[:3], keys_of(30)[20:23])
        assert torch.equal(layer(x), expected)
    assert not torch.equal(inner, expected[:3])


def test_mask_of_an_odd_number_of_units() -> None:
    assert KeyedDropout(0.5, name="a").kept(keys_of(10), 7).shape == (10, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [KeyedDropout, KeyedAlphaDropout])
@pytest.mark.parametrize("per", ["element", "channel"])
def test_keeps_the_dtype(kind: type[KeyedDropout], dtype: torch.dtype, per: str) -> None:
    assert applied(kind(0.5, name="a", per=per), torch.ones(2, 4, dtype=dtype)).dtype == dtype


def test_has_no_state_and_can_be_copied() -> None:
    layer, x = KeyedDropout(0.5, name="a"), torch.ones(9, 4)
    expected = applied(layer, x)
    clone = copy.deepcopy(layer)
    assert layer.state_dict() == clone.state_dict() == {}
    assert torch.equal(applied(clone, x), expected)


def test_inputs_of_many_lengths_have_their_own_masks() -> None:
    layer, fresh = KeyedDropout(0.5, name="a"), [KeyedDropout(0.5, name="a") for _ in range(30)]
    for _ in range(2):
        for length, other in enumerate(fresh):
            x = torch.ones(5, length)
            assert torch.equal(applied(layer, x), applied(other, x))
    assert len(layer._units._stored) == 8


def test_greenlets_have_keys_of_their_own() -> None:
    layer, x = KeyedDropout(0.5, name="a"), torch.ones(4, 30)
    main = greenlet.getcurrent()

    def forward(keys: Tensor) -> Tensor:
        with use_sample_keys(keys):
            main.switch()
            first = layer(x)
            main.switch()
            return torch.stack([first, layer(x)])

    keys = keys_of(12).split(4)
    shards = [greenlet.greenlet(forward) for _ in keys]
    for shard, own in zip(shards, keys, strict=True):
        shard.switch(own)
    for shard in reversed(shards):
        shard.switch()
    found = [shard.switch() for shard in shards]
    for both, own in zip(found, keys, strict=True):
        with use_sample_keys(own):
            assert torch.equal(both, torch.stack([layer(x), layer(x)]))
    with pytest.raises(ValueError, match="training needs the keys"):
        layer(x)


def test_threads_have_keys_of_their_own() -> None:
    layer, x = KeyedDropout(0.5, name="a"), torch.ones(4, 30)
    with use_sample_keys(keys_of(4)), ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(layer, x).exception(), ValueError)


class Layers(nn.Module):
    """Uses its first layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Dropout(0.5), nn.Dropout1d(0.25), nn.AlphaDropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.third(self.second(self.first(x))))


def test_compiled_layers_draw_the_same_masks() -> None:
    plain = convert_dropout(Layers())
    compiled = copy.deepcopy(plain)
    graphs = CompileCounter()
    compiled.compile(fullgraph=True, backend=graphs)
    for count, epoch in ((3, 0), (3, 1), (5, 0), (9, 2), (3, 0)):
        x, keys = torch.randn(count, 4, 5), rng.sample_keys(torch.arange(count), seed=0, epoch=epoch)
        for _ in range(2):
            assert torch.equal(applied(compiled, x, keys), applied(plain, x, keys))
    assert graphs.frame_count == 2  # for one size, and for any
    assert torch.equal(compiled.eval()(x), plain.eval()(x))
