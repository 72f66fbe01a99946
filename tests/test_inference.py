"""Statistics of studies, against scipy and figures worked out by hand."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from peft_mllm.study.inference.differences import (
    Comparison,
    Difference,
    difference,
    differences_by_seed,
    holm,
    paired_differences,
    unstable,
)
from peft_mllm.study.inference.effects import Cell, factor_effect
from peft_mllm.study.inference.groups import group, letters
from peft_mllm.study.inference.intervals import mean_interval, spread
from peft_mllm.study.inference.pareto import pareto
from peft_mllm.study.inference.ranks import kendalls_w, rank_stability
from peft_mllm.study.inference.resampling import MOST_BLOCKS, draw_means
from peft_mllm.study.inference.variance import Spread, spread_of_mean, table, weighted

# worked out by hand: 2 seeds, 3 questions, mean 4; seeds 3 and 5, questions 2, 4 and 6
BY_HAND = np.array([[0.0, 4.0, 5.0], [4.0, 4.0, 7.0]])


def graded(shape, *, mean=50.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 20, shape)


def right(*counts, of):
    """Rows with so many right answers (100) first and wrong ones (0) after."""
    return np.array([[100.0] * count + [0.0] * (of - count) for count in counts])


# --- the two-way table ---


def test_mean_squares_by_hand():
    found = table(BY_HAND)
    # 3 ((-1)^2 + 1^2) / 1;  2 ((-2)^2 + 0 + 2^2) / 2;  residuals -1 1 0 / 1 -1 0, over 1 x 2
    assert (found.mean, found.seeds, found.questions, found.rest) == (4.0, 6.0, 8.0, 2.0)


def test_the_variance_of_the_mean_by_hand():
    found = spread_of_mean(table(BY_HAND))
    assert found.variance == pytest.approx((6 + 8 - 2) / 6)
    assert found.freedom == pytest.approx(1 / ((6 / 12) ** 2 / 1 + (6 / 12) ** 2 / 2))


def test_seeds_that_agree_by_chance_are_not_taken_for_knowledge():
    agree = np.array([[0.0, 4.0, 5.0], [4.0, 0.0, 5.0]])  # both seeds have the mean 3
    found = table(agree)
    assert found.seeds == 0
    assert spread_of_mean(found).variance == pytest.approx(max(found.questions, found.rest) / 6)


@pytest.mark.parametrize("scores", [[1.0, 2.0], [[]], [[float("nan")]]], ids=["one axis", "empty", "nan"])
def test_scores_are_two_axes_of_figures(scores):
    with pytest.raises(ValueError, match="scores"):
        mean_interval(scores)


def test_freedom_of_a_sum_lies_between_its_parts():
    found = weighted([Spread(1.0, 4), Spread(1.0, 4)], [0.5, 0.5])
    assert (found.variance, found.freedom) == (0.5, pytest.approx(8))


# --- intervals ---


def test_one_seed_of_right_and_wrong_has_wilsons_interval():
    found = mean_interval(right(81, of=263))
    assert (found.low, found.high) == pytest.approx((25.53, 36.62), abs=0.005)  # Newcombe 1998, table I, method 3


@pytest.mark.parametrize("seeds", [1, 3])
def test_all_right_or_all_wrong_keeps_a_width(seeds):
    assert mean_interval(right(*[50] * seeds, of=50)).low == pytest.approx(92.87, abs=0.01)
    assert mean_interval(right(*[0] * seeds, of=50)).high == pytest.approx(7.13, abs=0.01)


def test_a_bootstrap_without_seeds_effects_is_the_t_interval():
    scores = np.repeat(graded((1, 400)), 5, axis=0)
    found = mean_interval(scores)
    low, high = stats.t.interval(0.95, 399, scores[0].mean(), stats.sem(scores[0]))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low) / 2)


def test_seeds_alone_give_the_t_interval_of_their_means():
    means = np.array([40.0, 50.0, 55.0])
    found = mean_interval(np.repeat(means[:, None], 50, axis=1))
    low, high = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    # three seeds have 10 different draws: the percentiles are the outermost of them, and on the safe side
    assert high - low < found.high - found.low < 1.2 * (high - low)


def test_the_interval_keeps_within_what_can_be_scored():
    found = mean_interval(np.vstack([right(99, of=100), right(70, of=100)]))
    assert found.high == 100.0


def test_spread_over_seeds():
    assert spread(right(10, 20, 30, of=100)) == pytest.approx(10.0)
    assert spread(right(10, of=100)) is None


def test_draws_have_the_variance_of_the_two_way_table():
    rng = np.random.default_rng(3)
    scores = rng.normal(0, 2, (4, 1)) + rng.normal(0, 20, 300) + rng.normal(0, 15, (4, 300))
    assert draw_means([scores]).var() == pytest.approx(spread_of_mean(table(scores)).variance, rel=0.1)


def test_many_questions_are_drawn_in_blocks_of_the_same_variance():
    scores = graded((1, 10 * MOST_BLOCKS + 7))
    drawn = draw_means([scores])
    assert drawn.mean() == pytest.approx(scores.mean(), abs=0.05)
    assert drawn.std() == pytest.approx(stats.sem(scores[0]), rel=0.1)


def test_groups_of_a_task_share_the_drawn_questions():
    scores = graded((1, 200))
    first, second = draw_means([scores, scores + 5]).T
    assert second - first == pytest.approx(5)


# --- differences ---


@pytest.mark.parametrize(("above", "below"), [(12, 3), (3, 12), (1, 0), (40, 40), (7, 0)])
def test_one_seed_of_right_and_wrong_is_mcnemars_exact_test(above, below):
    first = right(above, of=100)
    second = np.roll(right(below, of=100), 50, axis=1)
    found = difference(first, second)
    assert found.value == pytest.approx(above - below)
    assert found.p == pytest.approx(stats.binomtest(above, above + below).pvalue)
    assert found.low < found.value < found.high


def test_the_interval_of_one_seed_by_hand():
    # Bonett & Price 2012: (13/102, 4/102), z = 1.96
    found = difference(right(12, of=100), np.roll(right(3, of=100), 50, axis=1))
    half = 1.959964 * ((17 / 102 - (9 / 102) ** 2) / 102) ** 0.5
    assert (found.low, found.high) == pytest.approx((100 * (9 / 102 - half), 100 * (9 / 102 + half)))


def test_one_seed_graded_is_the_paired_t_test():
    first, second = graded((1, 60), mean=55, seed=1), graded((1, 60), seed=2)
    found, known = difference(first, second), stats.ttest_rel(first[0], second[0])
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))


def test_questions_that_do_not_matter_leave_the_t_test_over_seeds():
    first = np.repeat([[60.0], [52.0], [57.0]], 40, axis=1)
    second = np.repeat([[50.0], [51.0], [49.0]], 40, axis=1)
    known = stats.ttest_rel(first[:, 0], second[:, 0])
    assert difference(first, second).p == pytest.approx(known.pvalue)


def test_seeds_that_are_copies_leave_the_t_test_over_questions():
    first, second = graded((1, 60), mean=55, seed=1), graded((1, 60), seed=2)
    known = stats.ttest_rel(first[0], second[0])
    assert difference(np.repeat(first, 3, axis=0), np.repeat(second, 3, axis=0)).p == pytest.approx(known.pvalue)


def test_swapping_the_groups_turns_the_sign():
    one, other = (
        difference(graded((3, 50)), graded((3, 50), seed=1)),
        difference(graded((3, 50), seed=1), graded((3, 50))),
    )
    assert (other.value, other.low, other.high, other.p) == pytest.approx((-one.value, -one.high, -one.low, one.p))


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_groups(seeds):
    same = graded((seeds, 40))
    assert difference(same, same) == Difference(0.0, None, None, 1.0, seeds, 40)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_same_difference_everywhere_is_judged_by_its_signs(seeds):
    found = difference(right(*[8] * seeds, of=8), right(*[0] * seeds, of=8))
    assert found.p == pytest.approx(2**-7)
    assert (found.value, found.high) == (100.0, 100.0)
    assert 0 < found.low < 100


def test_one_question_proves_nothing():
    assert difference([[70.0], [71.0]], [[10.0], [11.5]]).p == 1.0
    assert difference([[70.0]], [[10.0]]).p == 1.0


def test_groups_of_other_shapes_are_not_compared():
    with pytest.raises(ValueError, match=r"same seeds and questions; here are .*\(2, 9\)"):
        paired_differences({"lora": np.zeros((3, 9)), "ia3": np.zeros((2, 9))})


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04 -> the last may not be below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_family_shares_what_it_shows_of_seeds():
    """Three seeds of two methods agree by chance; the others show that seeds matter."""
    wild = {f"m{i}": graded((3, 100), seed=i) + np.roll([[-15.0], [0.0], [15.0]], i, axis=0) for i in range(3)}
    calm = {"a": graded((3, 100), seed=8), "b": graded((3, 100), seed=9) + 12}
    alone = difference(calm["b"], calm["a"])
    family = {(each.first, each.second): each.difference for each in paired_differences({**calm, **wild})}
    assert alone.p < 0.05
    assert family["a", "b"].value == pytest.approx(-alone.value)
    assert family["a", "b"].p > 0.1


def test_one_unstable_group_does_not_widen_the_pairs_of_the_others():
    rng = np.random.default_rng(0)
    calm = {f"m{i}": graded((3, 100), seed=i) + rng.normal(0, 1, (3, 1)) for i in range(4)}
    calm["m0"] = calm["m0"] + 12
    wild = graded((3, 100), seed=9) + np.array([[-30.0], [0.0], [30.0]])
    assert unstable(calm) == ()
    assert unstable({**calm, "wild": wild}) == ("wild",)
    without = {(each.first, each.second): each.difference for each in paired_differences(calm)}
    found = {(each.first, each.second): each.difference for each in paired_differences({**calm, "wild": wild})}
    for pair, each in without.items():
        if each.high - each.low == pytest.approx(found[pair].high - found[pair].low):
            continue
        own = difference(calm[pair[0]], calm[pair[1]])  # the larger one, with its own degrees of freedom
        assert (found[pair].low, found[pair].high) == pytest.approx((own.low, own.high))
    assert found["m0", "wild"].p > 0.1
    assert found["m0", "wild"] == difference(calm["m0"], wild)


def test_seeds_by_hand():
    """The rule of docs/study.md: G = 3, S = 3, one question each."""
    runs = {"a": [10.0, 12.0, 14.0], "b": [20.0, 21.0, 25.0], "c": [30.0, 36.0, 30.0]}
    x = np.array(list(runs.values()))
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean()
    pooled = 2 * (rest**2).sum() / 4
    found = {(each.first, each.second): each.difference for each in differences_by_seed(runs)}
    for (first, second), each in found.items():
        own = np.var(np.subtract(runs[first], runs[second]), ddof=1)
        square, freedom = pooled, 4.0
        if own > pooled:
            square, freedom = own, own**2 / (pooled**2 / 4 + (own - pooled) ** 2 / 2)
        half = stats.t.ppf(0.975, freedom) * np.sqrt(square / 3)
        assert (each.low, each.high) == pytest.approx((each.value - half, each.value + half))


def test_an_interval_by_the_formulas_of_the_guide():
    rng = np.random.default_rng(6)
    groups = {name: graded((3, 20), seed=seed) + rng.normal(0, 4, (3, 1)) for seed, name in enumerate("abcd")}
    x = np.array([of.mean(axis=1) for of in groups.values()])
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean()
    pooled, f = 2 * 20 * (rest**2).sum() / 6, 6
    larger = 0
    for each in paired_differences(groups):
        d = groups[each.first] - groups[each.second]
        own = 20 * ((d.mean(axis=1) - d.mean()) ** 2).sum() / 2
        questions = 3 * ((d.mean(axis=0) - d.mean()) ** 2).sum() / 19
        left = d - d.mean(axis=1, keepdims=True) - d.mean(axis=0) + d.mean()
        rest = (left**2).sum() / 38
        square, m = (pooled, f) if own <= pooled else (own, own**2 / (pooled**2 / f + (own - pooled) ** 2 / 2))
        larger += own > pooled
        part = max(square, rest)
        whole = part + max(questions - rest, 0)
        freedom = whole**2 / (part**2 / m + (whole - part) ** 2 / 19)
        half = stats.t.ppf(0.975, freedom) * np.sqrt(whole / 60)
        assert unstable(groups) == ()
        assert (each.difference.low, each.difference.high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert 0 < larger < 6


def test_two_groups_alone_are_tested_as_a_pair():
    first, second = graded((3, 50), mean=60), graded((3, 50), seed=1)
    assert paired_differences({"a": first, "b": second})[0].difference == difference(first, second)


def test_what_has_no_seeds_takes_part_as_equal_rows():
    zero = np.broadcast_to(right(20, of=100), (3, 100))
    tuned = right(78, 80, 81, of=100)
    found = paired_differences({"zero-shot": zero, "lora": tuned, "ia3": tuned[::-1]}, pairs=[("lora", "zero-shot")])
    assert [(each.first, each.second) for each in found] == [("lora", "zero-shot")]
    assert found[0].told_apart
    assert found[0].adjusted == found[0].difference.p


# --- groups ---


def comparisons(names, apart):
    return [
        Comparison(a, b, Difference(1, 0, 2, 0.5, 3, 100), 0.001 if a + b in apart or b + a in apart else 0.5)
        for a, b in combinations(names, 2)
    ]


@pytest.mark.parametrize(
    ("apart", "expected"),
    [
        ([], {"A": "a", "B": "a", "C": "a", "D": "a"}),
        (["AB", "AC", "AD", "BC", "BD", "CD"], {"A": "a", "B": "b", "C": "c", "D": "d"}),
        (["AC", "AD", "BD"], {"A": "a", "B": "ab", "C": "bc", "D": "c"}),
        (["AD"], {"A": "a", "B": "ab", "C": "ab", "D": "b"}),
        (["AB", "CD"], {"A": "ab", "B": "cd", "C": "ac", "D": "bd"}),
    ],
)
def test_letters_by_hand(apart, expected):
    found = letters("ABCD", {frozenset(pair) for pair in apart})
    assert {name: "".join(of) for name, of in found.items()} == expected


def test_letters_say_exactly_what_was_compared():
    rng = np.random.default_rng(0)
    names = "ABCDEFGH"
    for _ in range(50):
        apart = {frozenset(pair) for pair in combinations(names, 2) if rng.random() < 0.4}
        found = letters(names, apart)
        for pair in combinations(names, 2):
            assert bool(set(found[pair[0]]) & set(found[pair[1]])) == (frozenset(pair) not in apart)


def test_the_best_and_all_not_told_apart_from_it():
    means = {"C": 70.0, "A": 90.0, "B": 85.0, "D": 60.0}
    found = group(means, comparisons("ABCD", ["AC", "AD", "BD"]))
    assert found.best == ("A", "B")
    assert found.letters == {"A": ("a",), "B": ("a", "b"), "C": ("b", "c"), "D": ("c",)}
    assert group(means, comparisons("ABCD", ["AC", "AD", "BD"]), more_is_better=False).best == ("D", "C")


# --- ranks ---


def test_clear_ranks_are_stable():
    tasks = [{name: graded((3, 200), mean=mean, seed=i) for i, (name, mean) in enumerate(MEANS.items())}] * 2
    found = rank_stability(tasks)
    assert list(found.ranks) == ["lora", "adapter", "ia3"]
    assert [(each.value, each.low, each.high) for each in found.ranks.values()] == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert found.ranks["lora"].first == 1.0
    assert found.agreement == 1.0


MEANS = {"ia3": 20.0, "lora": 80.0, "adapter": 50.0}


def test_equal_methods_are_first_in_equal_shares():
    found = rank_stability([{name: graded((3, 200)) for name in MEANS}])
    for each in found.ranks.values():
        assert (each.value, each.mean, each.first) == (2.0, 2.0, pytest.approx(1 / 3))
    assert found.agreement is None


def test_less_may_be_better():
    found = rank_stability([{"a": right(10, of=100), "b": right(90, of=100)}], more_is_better=False)
    assert list(found.ranks) == ["a", "b"]
    assert found.agreement is None


def test_every_task_has_the_same_weight():
    small = {"a": right(100, of=100), "b": right(0, of=100)}
    large = {"a": right(300, of=2000), "b": right(1700, of=2000)}
    assert rank_stability([small, large]).ranks["a"].value == 1.0


def test_unsure_ranks_show_it():
    close = {
        name: right(50 + i, 52 - i, 49 + i, of=100)[:, np.random.default_rng(i).permutation(100)]
        for i, name in enumerate(MEANS)
    }
    found = rank_stability([close])
    assert all(each.low == 1 and each.high == 3 for each in found.ranks.values())
    assert sum(each.first for each in found.ranks.values()) == pytest.approx(1)


def test_ranking_needs_the_same_methods_everywhere():
    with pytest.raises(ValueError, match="methods"):
        rank_stability([{"a": right(1, of=2)}, {"b": right(1, of=2)}])


def test_kendalls_w():
    assert kendalls_w(np.array([[1.0, 2, 3], [1, 2, 3]])) == 1.0
    assert kendalls_w(np.array([[1.0, 2, 3], [3, 2, 1]])) == 0.0
    # without ties, W follows from the mean of Spearman's correlations: r = (m W - 1) / (m - 1)
    scores = graded((4, 6))
    pairs = [stats.spearmanr(a, b).statistic for a, b in combinations(scores, 2)]
    assert kendalls_w(scores) == pytest.approx((3 * np.mean(pairs) + 1) / 4)


def test_kendalls_w_with_ties_by_hand():
    # ranks 3 1.5 1.5 and 3 2 1: sums 6 3.5 2.5, S = 6.5; 12 S / (4 x 24 - 2 x 6)
    assert kendalls_w(np.array([[1.0, 2, 2], [1, 2, 3]])) == pytest.approx(78 / 84)


# --- effects ---


def cell(name, effect, *, task="vqa", seed=0, shape=(3, 200)):
    before = graded(shape, seed=seed)
    return Cell(name, task, before + effect + graded(shape, mean=0, seed=seed + 100) / 4, before)


def test_one_cell_is_the_paired_difference():
    one = cell("lora", 5.0)
    found = factor_effect([one])
    assert found.pooled == found.cells[0].difference == difference(one.after, one.before)
    assert (found.differ, found.between, found.expected) == (None, None, None)


def test_an_effect_is_pooled_with_equal_weights_and_its_cells_agree():
    found = factor_effect([cell("lora", 5.0, seed=1), cell("ia3", 5.0, seed=2), cell("adapter", 5.0, seed=3)])
    assert found.pooled.value == pytest.approx(np.mean([each.difference.value for each in found.cells]))
    assert found.pooled.low < 5 < found.pooled.high
    assert (found.same_sign, found.gains, found.losses) == (True, 3, 0)
    assert found.differ > 0.05
    assert found.pooled.high - found.pooled.low < found.cells[0].difference.high - found.cells[0].difference.low


def test_cells_that_disagree_are_said_to():
    found = factor_effect([cell("lora", 6.0, seed=1), cell("ia3", -6.0, seed=2), cell("adapter", 0.0, seed=3)])
    assert (found.same_sign, found.gains, found.losses) == (False, 1, 1)
    assert found.differ < 0.001
    assert found.between == pytest.approx(6.0, abs=1.0)
    assert found.expected[0] < -6
    assert found.expected[1] > 6


def test_tasks_of_other_sizes_are_pooled_by_their_cells():
    cells = [
        cell("lora", 2.0, seed=1),
        cell("ia3", 2.0, seed=2),
        cell("lora", 8.0, task="captions", seed=3, shape=(2, 50)),
    ]
    found = factor_effect(cells)
    assert found.pooled.value == pytest.approx(4.0, abs=0.6)
    assert (found.pooled.seeds, found.pooled.questions) == (2, 250)


def test_a_cell_with_other_questions_is_refused():
    with pytest.raises(ValueError, match=r"cells of vqa .* ia3"):
        factor_effect([cell("lora", 1.0), cell("ia3", 1.0, shape=(3, 100))])
    with pytest.raises(ValueError, match="at least one"):
        factor_effect([])


# --- fronts ---


def test_the_front_by_hand():
    points = {"lora": (80.0, 40.0), "ia3": (60.0, 1.0), "prefix": (55.0, 3.0), "full": (82.0, 900.0), "x": (80.0, 50.0)}
    found = pareto(points, better=("more", "less"))
    assert found.names == ("full", "lora", "ia3")
    assert found.left_out == ()


def test_ties_stay_and_what_is_missing_is_named():
    points = {
        "a": (1.0, 2.0),
        "b": (1.0, 2.0),
        "c": (2.0, 1.0),
        "d": (1.0, 1.0),
        "e": (None, 5.0),
        "f": (3.0, float("nan")),
    }
    found = pareto(points)
    assert found.names == ("c", "a", "b")
    assert found.left_out == ("e", "f")


def test_the_front_is_what_nothing_dominates():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = {str(i): tuple(map(float, rng.integers(0, 6, 2))) for i in range(15)}
        expected = {
            name
            for name, (x, y) in points.items()
            if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
        }
        assert set(pareto(points).names) == expected
