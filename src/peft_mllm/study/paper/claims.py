"""The paper's seventeen claims, each tested on the runs of a study.

A claim holds, or does not, where every contrast that decides it is told apart from chance; where that is not so, it
cannot be told, and where the study has not the runs, it is not tested. `seen` are the tasks that the study calls
so; a trained task that is not among them is unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft_mllm.study.analysis import Claim
from peft_mllm.study.outcomes import Cell, Outcome
from peft_mllm.study.paper.about_factors import (
    best_location,
    connector_helps,
    frozen_is_best,
    most_data_is_best,
    size_matters,
    tower_does_not_help,
    unseen_gain_from_data,
)
from peft_mllm.study.paper.about_methods import (
    adapter_first,
    best_of_all,
    best_on_seen,
    best_on_unseen,
    larger_is_better,
)
from peft_mllm.study.paper.about_training import (
    adapter_best_judged,
    adapter_makes_up_least,
    carries_over_early,
    rate_and_stability,
    size_and_stability,
)
from peft_mllm.study.paper.evidence import UNTESTED, Finding
from peft_mllm.study.paper.groups import groups_of, peft_only
from peft_mllm.study.paper.matching import Evidence
from peft_mllm.study.paper.tables import paper

TESTS: tuple[tuple[Callable[[Evidence], Finding], str], ...] = (
    (adapter_first, "adapter and another method"),
    (best_on_unseen, "adapter, lora and another method on tasks that are not called seen"),
    (best_on_seen, "ia3, prefix and another method, scored on tasks that are called seen"),
    (connector_helps, "the connector frozen and tuned, on tasks that are not called seen"),
    (frozen_is_best, "the connector frozen and tuned, scored on tasks that are called seen"),
    (size_matters, "one method in two sizes"),
    (best_location, "lora, ia3 or adapter at two locations"),
    (most_data_is_best, "two sizes of the training data, three for what each step gains"),
    (unseen_gain_from_data, "two sizes of the training data"),
    (size_and_stability, "adapter, lora or prefix in two sizes, each with two seeds"),
    (rate_and_stability, "ia3 or prefix at two learning rates, each with two seeds"),
    (carries_over_early, "scores on the study's other tasks at two points after the lowest validation loss"),
    (adapter_makes_up_least, "adapter and another method, scored on a task that measures hallucination"),
    (adapter_best_judged, "adapter and another method, scored by a judge on MMHal-Bench"),
    (tower_does_not_help, "the vision tower frozen and tuned"),
    (best_of_all, "LLaVA-1.5-13B with ia3 and a tuned connector, and two other models"),
    (larger_is_better, "LLaVA-1.5-7B and one of LLaVA-1.5-13B and ShareGPT4V-7B"),
)
"""By the claim's number, with what a study needs for it."""


def claims_of(
    outcomes: Sequence[Outcome], *, seen: Sequence[str] = (), blocks: Sequence[Sequence[Cell]] = ()
) -> tuple[Claim, ...]:
    """Test each claim on a study's runs.

    Args:
        outcomes: the runs that count.
        seen: tasks that the base could already do, by the names that the scores have.
        blocks: the lines that the study compares with each other: they share what they show of seeds.
    """
    evidence = Evidence(peft_only(groups_of(outcomes, blocks=blocks)), tuple(seen))
    return tuple(
        _claim(number, said, test(evidence), needs)
        for number, (said, (test, needs)) in enumerate(zip(paper()["claims"], TESTS, strict=True), start=1)
    )


def _claim(number: int, said: dict[str, str], finding: Finding, needs: str) -> Claim:
    because = f"Needs {needs}." if finding.verdict == UNTESTED else f"{finding.because}."
    return Claim(number, said["claim"], finding.verdict, because, said["in_paper"])
