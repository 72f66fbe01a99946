"""The ledger of one run: what it gained is in its scores, what it cost is here.

A figure that the run's files do not give is absent; none is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_mllm.methods import METHODS
from peft_mllm.study.flops import Passed, Sizes, paper_training_flops, training_flops
from peft_mllm.study.hallucination import hallucination_of
from peft_mllm.study.outcomes import CurvePoint
from peft_mllm.study.results import Result

TRAINABLE = "trainable"
"""Parameters that train."""
SECONDS = "seconds"
"""Of training, with its evaluations."""
SECONDS_SCORING = "seconds_scoring"
"""Of answering all tasks at the end."""
MEMORY = "memory"
"""Peak bytes of the device, or of the process where there is none."""
DISK = "disk"
"""Bytes of the adapter."""
FLOPS = "flops"
"""Of training, by standard accounting (flops.py)."""
FLOPS_PAPER = "flops_paper"
"""Of training, by the study's formula."""
HALLUCINATION = "hallucination"
"""As the metric calls it (hallucination.py); lower is better."""
ROBUSTNESS = "robustness"
"""Score at the last scored point of the training curve minus that at the best."""

WALL_CLOCK = frozenset({SECONDS, SECONDS_SCORING, MEMORY})
"""Figures that differ from one execution of the same run to the next."""


def figures_of(
    result: Result, curve: Sequence[CurvePoint], task: str, *, describing: str | None = None
) -> dict[str, float]:
    """All figures of a run that its files give.

    Args:
        result: its file.
        curve: the points of its training curve that were scored.
        task: the trained one, as the curve's scores call it.
        describing: the task on which the study measures hallucination; None takes the run's first that does.
    """
    figures: dict[str, float | None] = {
        TRAINABLE: result.trainable_parameters,
        SECONDS: result.seconds,
        SECONDS_SCORING: sum(score.seconds for score in result.scores.values()),
        MEMORY: result.peak_memory_bytes,
        DISK: result.adapter_bytes,
        FLOPS: _flops(result),
        FLOPS_PAPER: _flops_paper(result),
        HALLUCINATION: hallucination_of(result, describing),
        ROBUSTNESS: robustness(curve, task),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def robustness(curve: Sequence[CurvePoint], task: str) -> float | None:
    """What further training costs: the score at the curve's last point minus that at the best; None without both."""
    best = next((point for point in curve if point.best and task in point.scores), None)
    after = [point for point in curve if best and point.step > best.step and task in point.scores]
    return after[-1].scores[task].value - best.scores[task].value if best and after else None


def _flops(result: Result) -> float | None:
    if result.is_zero_shot:
        return 0.0
    sizes, passed = _sizes(result), _passed(result)
    if sizes is None or passed is None:
        return None
    return training_flops(sizes, _trained(result), passed, own=trains_own(result.method.name))


def _flops_paper(result: Result) -> float | None:
    if result.is_zero_shot:
        return 0.0
    tokens = result.training.sequence_tokens if result.training else 0
    if not tokens or not result.model.parameters:
        return None
    opened = sum(count for part, count in _trained(result).items() if part != "llm" or trains_own(result.method.name))
    return paper_training_flops(result.model.parameters - opened, result.trainable_parameters, tokens)


def trains_own(method: str) -> bool:
    """Whether a method trains the language model's own parameters, not ones that it adds."""
    from peft_mllm.methods.base import Method

    return method in METHODS and METHODS[method].trains is not Method.trains


def _trained(result: Result) -> dict[str, int]:
    return {part: each.parameters for part, each in result.trainable.items()}


def _sizes(result: Result) -> Sizes | None:
    """None where the run's file does not give the parts."""
    parts = result.model.parts
    if not parts:
        return None
    return Sizes(
        llm=parts.get("llm", 0),
        lm_head=parts.get("lm_head", 0),
        connector=parts.get("connector", 0),
        vision=parts.get("vision", 0),
        elsewhere=parts.get("elsewhere", 0),
        embeddings=result.model.embeddings,
    )


def _passed(result: Result) -> Passed | None:
    """None where tokens were not counted, or images were and it is not known how large they are."""
    training = result.training
    if training is None or not training.sequence_tokens or (training.images and not result.model.patches):
        return None
    return Passed(training.sequence_tokens, training.images * result.model.patches)
