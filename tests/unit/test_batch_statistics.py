"""What batch norm computes from the rows of all shards: NumPy, used on the CPU, and torch, used on CUDA, give the same bits."""

import pytest
import torch
from torch import Tensor

from distributed.models import batch_statistics
from distributed.models.batch_statistics import GradientTerms, Statistics, combined, gradient_terms

CHANNELS = 37


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def statistics_rows(shards: int, dtype: torch.dtype) -> Tensor:
    means, variances = random(2, shards, CHANNELS, dtype=dtype, seed=1)
    counts = torch.arange(shards, dtype=dtype).roll(-1).view(-1, 1) * 7  # one shard is empty, unless there is only one
    return torch.cat([means * 5 + 3, variances.abs(), counts if shards > 1 else counts + 7], 1)


def compute(shards: int, dtype: torch.dtype, of_x: torch.dtype, *, affine: bool) -> tuple[Statistics, GradientTerms]:
    statistics = combined(statistics_rows(shards, dtype))
    weight = random(CHANNELS, dtype=dtype, seed=2).requires_grad_() if affine else None
    rows = random(shards, 2 * CHANNELS, dtype=dtype, seed=3)
    with torch.no_grad():
        return statistics, gradient_terms(rows, weight, statistics, 1e-5, of_x)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize(
    ("dtype", "of_x"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)],
)
def test_both_ways_give_the_same_bits(shards, dtype, of_x, affine, monkeypatch):
    statistics, terms = compute(shards, dtype, of_x, affine=affine)
    monkeypatch.setattr(batch_statistics, "is_plain_cpu", lambda _: False)
    by_torch, terms_by_torch = compute(shards, dtype, of_x, affine=affine)
    for found, expected in zip(
        (statistics.mean, statistics.variance, *statistics.sizes, *terms),
        (by_torch.mean, by_torch.variance, *by_torch.sizes, *terms_by_torch),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert terms.slope.dtype == of_x
    assert terms.slope.all(), "nothing was computed"


def test_statistics_equal_those_of_all_numbers():
    parts = [random(count, CHANNELS, dtype=torch.float64, seed=count) + count for count in (5, 1, 9)]
    rows = [torch.cat([part.mean(0), part.var(0, correction=0), torch.tensor([float(len(part))])]) for part in parts]
    mean, variance, sizes = combined(torch.stack(rows))
    everything = torch.cat(parts)
    assert (mean - everything.mean(0)).abs().max() < 1e-14
    assert (variance - everything.var(0, correction=0)).abs().max() < 1e-13
    assert (variance * sizes.unbiased - everything.var(0)).abs().max() < 1e-13
    assert sizes.fractions.flatten().tolist() == [5 / 15, 1 / 15, 9 / 15]


def test_sizes_are_not_those_of_an_earlier_batch():
    first, other = (statistics_rows(4, torch.float32) for _ in range(2))
    other[:, -1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert combined(first).sizes.total == 42
    assert combined(other).sizes.total == 10
    assert combined(other.double()).sizes.total.dtype == torch.float64
