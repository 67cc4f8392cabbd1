import math
from itertools import pairwise

import pytest
import torch

from distributed.training.totals import MetricSums, Totals, TotalsAccumulator

CPU = torch.device("cpu")


def batch_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits, labels


def losses_alone(*losses: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(losses), torch.zeros(len(losses), 10), torch.zeros(len(losses), dtype=torch.int64)


def test_totals_are_those_of_the_batch():
    losses, logits, labels = batch_of(500)
    metrics = TotalsAccumulator(CPU)
    metrics.add(losses, logits, labels)
    totals = metrics.read()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert totals.count == 500
    assert totals.mean_loss == pytest.approx(float(losses.mean()), rel=1e-12)
    assert totals.accuracy == float((ranks == 0).double().mean())
    assert totals.accuracy5 == float((ranks < 5).double().mean())
    assert totals.first_bad_step is None


@pytest.mark.parametrize("every", [1, 2, 5, 10])
def test_totals_do_not_depend_on_when_they_are_read(every):
    batches = [batch_of(33, seed) for seed in range(10)]
    complete, parts, total = TotalsAccumulator(CPU), TotalsAccumulator(CPU), Totals()
    for index, batch in enumerate(batches):
        complete.add(*batch)
        parts.add(*batch)
        if (index + 1) % every == 0:
            total += parts.read()
    assert total == complete.read()


def test_totals_of_ten_million_samples():
    """The fractions of their losses do not fit into an int64."""
    count, losses = 2**20, torch.full((2**20,), 0.9375)
    totals, metrics = TotalsAccumulator(CPU), MetricSums(["margin"], CPU)
    for _ in range(10):
        totals.add(losses, torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64))
        metrics.add("margin", losses - 1)
    assert totals.read().mean_loss == 0.9375
    assert metrics.read() == {"margin": -0.0625}


def test_totals_do_not_depend_on_the_order_of_batches():
    batches = [batch_of(33, seed) for seed in range(10)]
    one, other = TotalsAccumulator(CPU), TotalsAccumulator(CPU)
    for batch in batches:
        one.add(*batch)
    for batch in reversed(batches):
        other.add(*batch)
    assert one.read() == other.read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_totals_do_not_depend_on_order_and_grouping(dtype, scale):
    """Each loss becomes an integer before summing. Sums of rounded floating-point numbers would differ here."""
    losses, logits, labels = batch_of(1000)
    losses = (losses * scale).to(dtype)
    generator = torch.Generator().manual_seed(1)
    complete = TotalsAccumulator(CPU)
    complete.add(losses, logits, labels)
    expected = complete.read()
    plain = set()
    for _ in range(20):
        order = torch.randperm(1000, generator=generator)
        ends = sorted(torch.randint(0, 1001, (7,), generator=generator).tolist())
        metrics, total = TotalsAccumulator(CPU), Totals()
        for start, end in pairwise([0, *ends, 1000]):
            part = order[start:end]
            metrics.add(losses[part], logits[part], labels[part])
            if start % 2:
                total += metrics.read()
        assert total + metrics.read() == expected
        plain.add(float(torch.stack([losses[part].sum() for part in order.split(ends[0] or 1)]).sum()))
    assert len(plain) > 1, "the cuts and orders of this test make no difference to any sum"
    assert expected.mean_loss == pytest.approx(math.fsum(losses.tolist()) / 1000, rel=1e-12, abs=2**-40)


def test_a_loss_is_rounded_to_the_nearest_fraction():
    step = 2.0**-40
    metrics = TotalsAccumulator(CPU)
    for loss in (3 * step, 5.25 * step, 5.75 * step, 1 - step / 4, 7 + 0.5):
        metrics.add(torch.tensor([loss], dtype=torch.float64), torch.zeros(1, 10), torch.zeros(1, dtype=torch.int64))
        assert metrics.read().loss == round(loss / step)


def test_reading_resets_the_totals():
    metrics = TotalsAccumulator(CPU)
    metrics.add(*batch_of(5), step=3)
    metrics.add(*losses_alone(math.nan), step=4)
    metrics.read()
    assert metrics.read() == Totals()


def test_an_empty_shard_adds_nothing():
    metrics = TotalsAccumulator(CPU)
    metrics.add(*batch_of(0))
    assert metrics.read() == Totals()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_with_a_bad_loss_is_kept(bad):
    metrics = TotalsAccumulator(CPU)
    metrics.add(*losses_alone(1.0, 2.0), step=6)
    metrics.add(*losses_alone(1.0, bad), step=7)
    metrics.add(*losses_alone(bad), step=8)
    metrics.add(*losses_alone(1.0), step=9)
    assert metrics.read().first_bad_step == 7


def test_step_zero_can_be_the_bad_one():
    metrics = TotalsAccumulator(CPU)
    metrics.add(*losses_alone(math.nan), step=0)
    assert metrics.read().first_bad_step == 0


def test_a_mean_over_a_bad_loss_is_nan():
    metrics = TotalsAccumulator(CPU)
    metrics.add(*losses_alone(math.nan, 1.0))
    assert not math.isfinite(metrics.read().mean_loss)


@pytest.mark.parametrize("loss", [1e3, 1e5, 1e7, 1e30])
def test_huge_losses_do_not_wrap_around(loss):
    metrics = TotalsAccumulator(CPU)
    for step in range(100):
        metrics.add(*losses_alone(*[loss] * 128), step=step)
    totals = metrics.read()
    assert totals.first_bad_step is not None or totals.mean_loss == pytest.approx(loss, rel=1e-6)


def test_adding_totals_keeps_the_earlier_bad_step():
    assert (Totals(first_bad_step=3) + Totals(first_bad_step=5)).first_bad_step == 3
    assert (Totals() + Totals(first_bad_step=0)).first_bad_step == 0
    assert (Totals(1, 2, 3, 4) + Totals(10, 20, 30, 40)) == Totals(11, 22, 33, 44)


def test_means_over_no_samples_are_zero():
    assert (Totals().mean_loss, Totals().accuracy, Totals().accuracy5) == (0, 0, 0)


def test_with_three_classes_top5_is_always_correct():
    metrics = TotalsAccumulator(torch.device("cpu"))
    metrics.add(torch.ones(4), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert metrics.read().correct5 == 4


def test_skipped_steps_are_counted_until_they_are_read():
    metrics = TotalsAccumulator(CPU)
    for norm in (1.0, math.inf, 0.0, math.inf, math.nan):
        metrics.add_step(torch.tensor(norm))
    first = metrics.read()
    assert (first.skipped_steps, first.first_bad_step) == (3, None)
    metrics.add_step(torch.tensor(math.inf))
    assert (first + metrics.read()).skipped_steps == 4
    assert metrics.read() == Totals()
