"""What a reader must know before trusting a comparison: each a sentence, found in the results themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from peft_mllm.study.results import Result
from peft_mllm.study.wording import GLUE, and_list


def caveats(results: Sequence[Result], *, task: str, seen: Sequence[str]) -> Iterator[str]:
    """The sentences that apply, the gravest first."""
    yield from _differing(results)
    yield from _missing(results, task, seen)
    for name in (task, *seen):
        yield from _differing_questions(results, name)
    if not any(result.is_zero_shot for result in results):
        yield "There is no zero-shot run here, so gains and what was forgotten are not known."
    yield from _seeds(results)
    yield from dict.fromkeys(note for result in results for note in result.notes)


def _differing(results: Sequence[Result]) -> Iterator[str]:
    """What must be equal for a fair comparison, and is not."""
    trained = [result for result in results if not result.is_zero_shot]
    if _distinct(results, lambda result: result.model.fingerprint or result.model.source) > 1:
        names = dict.fromkeys(result.model.source for result in results)
        yield f"The runs do not share one base model ({and_list(list(names))})."
    if _distinct(trained, _fingerprint) > 1:
        yield "The runs were not trained on the same data."
    if _distinct(trained, lambda result: result.training and result.training.epochs) > 1:
        yield "The runs were not trained for the same number of epochs."


def _missing(results: Sequence[Result], task: str, seen: Sequence[str]) -> Iterator[str]:
    for name in (task, *seen):
        lacking = [result.name for result in results if name not in result.scores]
        if lacking:
            yield f"Without a score on {name}: {and_list(lacking)}."


def _differing_questions(results: Sequence[Result], task: str) -> Iterator[str]:
    scored = [result for result in results if task in result.scores]
    if _distinct(scored, lambda result: _asked(result, task)) > 1:
        yield f"Not all runs answered the same questions of {task}: compare their scores with care."
    if _distinct(scored, lambda result: result.scores[task].rule) > 1:
        yield f"Not all runs were scored by the same rule on {task}."


def _asked(result: Result, task: str) -> tuple[str, ...]:
    return tuple(prediction.id for prediction in result.predictions.get(task, ()))


def _fingerprint(result: Result) -> str:
    source = result.data.get("train")
    return source.fingerprint if source else ""


def _seeds(results: Sequence[Result]) -> Iterator[str]:
    scope = f"Intervals are 95{GLUE}% and say how far a figure would move with other questions"
    trained = [result for result in results if not result.is_zero_shot]
    if _distinct(trained, lambda result: result.seed) <= 1:
        yield f"{scope}, not with another seed: every run here has the same one."
    else:
        yield f"{scope}; compare the runs of one method to see how far it moves with the seed."


def _distinct(results: Sequence[Result], what: Callable[[Result], object]) -> int:
    return len({what(result) for result in results})
