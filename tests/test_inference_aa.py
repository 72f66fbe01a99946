"""Studies of methods that are equal in truth: how often the whole procedure claims a difference all the same.

A claim is any pair told apart after Holm's correction, at any place of a study. At a level of 5 % at most one study
in twenty may make one; the bound of each test is the 99.9 % quantile of that.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from peft_mllm.study.inference.differences import LEVEL, difference, holm, paired_differences
from peft_mllm.study.inference.effects import Cell, factor_effect
from peft_mllm.study.inference.groups import group
from peft_mllm.study.inference.intervals import mean_interval
from peft_mllm.study.inference.variance import Spread, p_value

STUDIES = 400
QUESTIONS = 320


@dataclass(frozen=True)
class World:
    """What studies are drawn from.

    Attributes:
        deviation: standard deviation of a method over seeds, in points, beyond the noise of single answers; per
            method, or one for all. The paper's own figures are 0.1 to 1.9.
        tastes: how far methods that are equal on the whole differ by question (standard deviation of logits).
        advantage: points by which the first method is truly better.
    """

    deviation: float | tuple[float, ...] = 1.0
    seeds: int = 3
    methods: int = 5
    tastes: float = 0.0
    advantage: float = 0.0
    centre: float = 0.7
    """Of the questions' logits, whose standard deviation is 1.5: a mean score of 62; 4 makes it 95.6."""

    def study(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Right or wrong answers (S, Q) of each method."""
        logits = rng.normal(self.centre, 1.5, QUESTIONS)
        slope = float((sigmoid(logits) * sigmoid(-logits)).mean())  # of the mean score by the logits
        deviations = np.broadcast_to(self.deviation, self.methods)
        found = {}
        for method in range(self.methods):
            seeds = rng.normal(0, deviations[method] / 100 / slope, (self.seeds, 1))
            shift = self.advantage / 100 / slope if method == 0 else 0.0
            chance = sigmoid(logits + self.tastes * rng.normal(size=QUESTIONS) + seeds + shift)
            found[f"m{method}"] = 100.0 * (rng.random((self.seeds, QUESTIONS)) < chance)
        return found


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def most_claims(studies: int) -> int:
    from scipy.stats import binom

    return int(binom.ppf(0.999, studies, LEVEL))


def claims(world: World, studies: int = STUDIES, seed: int = 0) -> int:
    """In how many studies any method is told apart from another; letters and best group must say the same."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(studies):
        study = world.study(rng)
        comparisons = paired_differences(study)
        grouped = group({name: of.mean() for name, of in study.items()}, comparisons)
        claimed = any(each.told_apart for each in comparisons)
        assert claimed == (len(set(grouped.letters.values())) > 1)
        assert claimed or len(grouped.best) == world.methods
        found += claimed
    return found


@pytest.mark.parametrize("deviation", [0.3, pytest.param(1.0, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_methods_are_seldom_told_apart(seeds, deviation):
    assert claims(World(deviation, seeds=seeds)) <= most_claims(STUDIES)


def test_the_level_is_used_where_seeds_matter():
    """A procedure that claims nothing at all would hold its level too."""
    assert claims(World(3.0, seeds=5), seed=8) > 0


@pytest.mark.parametrize(
    "world",
    [
        World(1.0, tastes=1.0),
        World((3.0, 0.3, 0.3, 0.3, 0.3)),
        World((6.0, 1.0, 1.0, 1.0, 1.0)),
        World((6.0, 1.0, 1.0, 1.0, 1.0), seeds=5),
        World((20.0, 1.0, 1.0, 1.0, 1.0)),
        World((20.0, 1.0, 1.0, 1.0, 1.0), seeds=5),
        World((15.0, 1.0, 1.0), methods=3),
        World((0.0, 1.0, 1.0, 3.0), methods=4),
        World(1.0, centre=4.0),
        World(3.0, methods=2),
    ],
    ids=str,
)
def test_the_level_holds_where_methods_differ_in_other_ways(world):
    assert claims(world) <= most_claims(STUDIES)


def test_the_level_holds_against_zero_shot():
    """Which has no seeds: the same answers in every row."""
    rng = np.random.default_rng(9)
    found = 0
    for _ in range(STUDIES):
        study = World((0.0, 3.0, 3.0, 3.0, 3.0)).study(rng)
        study["m0"] = np.broadcast_to(study["m0"][:1], study["m0"].shape)
        found += any(each.told_apart for each in paired_differences(study))
    assert found <= most_claims(STUDIES)


def test_questions_alone_would_not_hold_the_level():
    """Why seeds and questions are crossed: the mean over three seeds is still those seeds'."""
    rng = np.random.default_rng(4)
    found, studies = 0, 120
    for _ in range(studies):
        means = [of.mean(axis=0) for of in World(3.0).study(rng).values()]
        pairs = [one - other for place, one in enumerate(means) for other in means[:place]]
        t_tests = [p_value(each.mean(), Spread(each.var(ddof=1) / QUESTIONS, QUESTIONS - 1)) for each in pairs]
        found += min(holm(t_tests)) <= LEVEL
    assert found > studies / 4


def test_one_seed_would_not_hold_the_level():
    """Why seeds are needed: the questions alone take one run's luck for its method's worth."""
    rng = np.random.default_rng(1)
    world = World(3.0, seeds=1)
    found = sum(any(each.told_apart for each in paired_differences(world.study(rng))) for _ in range(STUDIES))
    assert found > 3 * LEVEL * STUDIES


def test_questions_times_seeds_would_not_hold_the_level():
    """The same mistake with three seeds: all answers thrown together as if each were a question of its own."""
    rng = np.random.default_rng(2)
    world = World(3.0)
    found = 0
    for _ in range(STUDIES):
        study = {name: of.reshape(1, -1) for name, of in world.study(rng).items()}
        found += any(each.told_apart for each in paired_differences(study))
    assert found > 3 * LEVEL * STUDIES


@pytest.mark.parametrize(
    ("world", "least"),
    [
        (World(0.3, advantage=10.0), 0.6),
        (World(1.0, advantage=10.0), 0.5),
        (World(1.0, advantage=10.0, seeds=5), 0.9),
        (World(1.0, advantage=10.0, methods=2, seeds=5), 0.9),
        (World(1.0, advantage=20.0), 0.95),
    ],
    ids=str,
)
def test_real_differences_are_found(world, least):
    rng = np.random.default_rng(3)
    found = [
        each.told_apart
        for _ in range(100)
        for each in paired_differences(world.study(rng))
        if "m0" in (each.first, each.second)
    ]
    assert np.mean(found) >= least


def test_one_unstable_method_does_not_hide_what_the_others_show():
    """Pooled with its own deviation, a fifth of the truly different pairs beside it would be found, not most."""
    rng = np.random.default_rng(3)
    found = [
        each.told_apart
        for _ in range(100)
        for each in paired_differences(World((1.0, 20.0, 1.0, 1.0, 1.0), advantage=20.0).study(rng))
        if "m0" in (each.first, each.second) and "m1" not in (each.first, each.second)
    ]
    assert np.mean(found) >= 0.6


@pytest.mark.parametrize("deviation", [0.3, 3.0])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_factor_without_effect_seldom_gets_one(tasks, deviation):
    rng = np.random.default_rng(4)
    world = World(deviation, methods=8)
    pooled = cells = differ = 0
    for _ in range(STUDIES):
        study = {task: world.study(rng) for task in range(tasks)}
        effect = factor_effect(
            [Cell(f"c{i}", str(t), of[f"m{i}"], of[f"m{i + 4}"]) for t, of in study.items() for i in range(4)]
        )
        pooled += effect.pooled.p < LEVEL
        cells += effect.gains + effect.losses > 0
        differ += effect.differ < LEVEL
    assert max(pooled, cells, differ) <= most_claims(STUDIES)


@pytest.mark.parametrize("deviation", [0.3, pytest.param(1.0, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_intervals_cover_the_truth(seeds, deviation):
    """95 % intervals of a method's mean over seeds and questions; of one seed, over questions alone."""
    rng = np.random.default_rng(5)
    world = World(deviation if seeds > 1 else 0.0, seeds=seeds, methods=1)
    truth = np.mean([world.study(rng)["m0"].mean() for _ in range(1500)])
    covered = 0
    for _ in range(STUDIES):
        of = mean_interval(world.study(rng)["m0"])
        covered += of.low <= truth <= of.high
    # 93 % is to be reached; 400 draws of it lie above 90.5 % in 97.5 % of the cases
    assert covered >= 0.905 * STUDIES


def test_the_procedure_is_quick():
    """A study of 1,000 runs: 33 families of 10 groups with 3 seeds."""
    import time

    rng = np.random.default_rng(6)
    families = [World(methods=10).study(rng) for _ in range(33)]
    start = time.process_time()
    for family in families:
        group({name: of.mean() for name, of in family.items()}, paired_differences(family))
        for of in family.values():
            mean_interval(of)
    assert time.process_time() - start < 3


def test_holm_is_needed():
    """Ten pairs at 5 % each, without correction, claim something in more studies than they may."""
    rng = np.random.default_rng(7)
    world = World(3.0, seeds=5)
    uncorrected = corrected = 0
    for _ in range(STUDIES):
        study = list(world.study(rng).values())
        p = [difference(a, b).p for i, a in enumerate(study) for b in study[:i]]
        uncorrected += min(p) < LEVEL
        corrected += min(holm(p)) < LEVEL
    assert uncorrected > 2 * LEVEL * STUDIES
    assert corrected < uncorrected
