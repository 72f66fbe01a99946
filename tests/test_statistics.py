"""The intervals of single runs, and figures in words."""

import pytest

from peft_mllm.study.statistics import estimate_difference, estimate_mean
from peft_mllm.study.wording import GLUE, and_list, count, duration, figure


def test_wilson_keeps_its_width_at_the_ends():
    perfect = estimate_mean([1.0] * 50, value=100.0)
    assert perfect.high == pytest.approx(100)
    assert perfect.low == pytest.approx(92.87, abs=0.01)


def test_wilson_against_the_published_formula():
    # 81 of 263, Newcombe 1998, table I, method 3: 0.2553 to 0.3662
    estimate = estimate_mean([1.0] * 81 + [0.0] * 182, value=8100 / 263)
    assert (estimate.low, estimate.high) == pytest.approx((25.53, 36.62), abs=0.005)


def test_graded_scores_are_bootstrapped_in_their_unit():
    scores = [0.0, 0.3, 0.6, 1.0] * 50
    estimate = estimate_mean(scores, value=47.5)
    standard_error = 100 * 0.3699 / 200**0.5
    assert estimate.low == pytest.approx(47.5 - 1.96 * standard_error, abs=0.6)
    assert estimate.high == pytest.approx(47.5 + 1.96 * standard_error, abs=0.6)


def test_difference_is_paired():
    """Two runs that share the hard questions are told apart by far less than their own intervals."""
    first, second = [100.0] * 60 + [0.0] * 40, [100.0] * 50 + [0.0] * 50
    paired = estimate_difference(first, second, value=10)
    assert 4 <= paired.low <= 6
    assert 15 <= paired.high <= 17


def test_without_questions_there_is_no_interval():
    assert estimate_mean([], value=90).low is None
    assert estimate_difference([], [], value=10).low is None


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (figure(-0.04), "0.0"),
        (figure(-2.0), "\N{MINUS SIGN}2.0"),
        (figure(2.0, signed=True), "+2.0"),
        (figure(None), "\N{EN DASH}"),
        (count(614_400), f"614{GLUE}k"),
        (count(20_979_712), f"21.0{GLUE}M"),
        (count(12), "12"),
        (duration(3.21), f"3.2{GLUE}s"),
        (duration(185), f"3{GLUE}min{GLUE}5{GLUE}s"),
        (duration(7800), f"2{GLUE}h{GLUE}10{GLUE}min"),
        (and_list(["a", "b", "c"]), "a, b and c"),
        (and_list(["a", "b", "c", "d", "e"]), "a, b, c and 2 more"),
        (and_list([]), ""),
    ],
)
def test_wording(made, text):
    assert made == text
