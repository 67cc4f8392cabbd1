"""The distributions of a random search."""

import math

import pytest

from launch.distributions import EXAMPLES, Distribution, parse_distribution, split_at_commas


def drawn(text: str, count: int = 2000) -> list[str]:
    distribution = parse_distribution(text)
    assert isinstance(distribution, Distribution)
    return [distribution.draw(0, index) for index in range(count)]


def test_numbers_cover_their_range_evenly():
    uniform = [float(text) for text in drawn("uniform(-1, 3)")]
    assert (min(uniform) >= -1, max(uniform) <= 3) == (True, True)
    assert sum(value < 0 for value in uniform) / 2000 == pytest.approx(0.25, abs=0.04)
    logarithmic = [math.log10(float(text)) for text in drawn("log_uniform(1e-4, 1e-1)")]
    assert (min(logarithmic) >= -4, max(logarithmic) <= -1) == (True, True)
    for decade in (-4, -3, -2):
        assert sum(decade <= value < decade + 1 for value in logarithmic) / 2000 == pytest.approx(1 / 3, abs=0.04)


def test_both_bounds_of_integers_and_every_choice_are_drawn():
    assert set(drawn("integers(-2, 2)")) == {"-2", "-1", "0", "1", "2"}
    assert set(drawn("choice(sgd, adamw, [1, 2])")) == {"sgd", "adamw", "[1, 2]"}


def test_draws_are_the_same_on_every_machine():
    """Recorded values: a resumed sweep needs the same ones."""
    assert drawn("log_uniform(1e-4, 1e-1)", 3) == ["0.003406", "0.000297", "0.007508"]
    narrow = set(drawn("uniform(0.12345678, 0.12345679)", 20))
    assert narrow <= {"0.12345678", "0.12345679"}, "rounding does not leave the bounds"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("log_unifrom(1, 2)", "there is no distribution log_unifrom; did you mean log_uniform?"),
        ("normal(0, 1)", "choose one of uniform, log_uniform, integers, choice"),
        ("uniform(1)", r"should have two numbers, e.g. uniform\(0, 0.5\)"),
        ("uniform(1, 2, 3)", "should have two numbers"),
        ("uniform(a, b)", "should have two numbers"),
        ("uniform(2, 1)", "the lower one first"),
        ("uniform(1, 1)", "the lower one first"),
        ("uniform(nan, 1)", "two finite bounds"),
        ("uniform(0, inf)", "two finite bounds"),
        ("uniform(-1e308, 1e308)", "two finite bounds"),
        ("log_uniform(0, 1)", "should have bounds above 0"),
        ("integers(0.5, 2)", "should have whole numbers as bounds"),
        ("integers(0, 1e300)", r"at most 2\*\*53"),
        ("choice()", r"should have different values, e.g. choice\(sgd, adamw\)"),
        ("choice(a, a)", "should have different values"),
    ],
)
def test_a_malformed_distribution_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_distribution(text)


def test_lists_are_not_distributions():
    assert [parse_distribution(text) for text in ("0.1,0.2", "", "sgd", "(1)")] == [None] * 4
    assert all(parse_distribution(text) for text in EXAMPLES.values())
    assert split_at_commas("1, [2, 3],{a = 1, b = 2},,4 ") == ["1", "[2, 3]", "{a = 1, b = 2}", "4"]
