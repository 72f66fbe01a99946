"""What a reader of a study must know before trusting it: each a sentence, found in the results themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from peft_mllm.study.contest import Structure
from peft_mllm.study.index import Planned
from peft_mllm.study.inference.differences import UNSTABLE
from peft_mllm.study.outcomes import Outcome
from peft_mllm.study.overview import Row
from peft_mllm.study.pairing import unstable_of
from peft_mllm.study.reading import StudyResults
from peft_mllm.study.settings import is_number
from peft_mllm.study.wording import GLUE, and_list

LARGEST, SMALLEST = "largest", "smallest"


def cautions(
    study: StudyResults, structure: Structure, rows: Sequence[Row], left_out: Sequence[int], *, compared: bool
) -> tuple[str, ...]:
    """The sentences that apply, the gravest first.

    Args:
        study: what was read.
        structure: who competes with whom.
        rows: by place.
        left_out: lines that could not be compared in their block.
        compared: whether any two lines were.
    """
    found = [
        *_unfinished(study),
        *_differing(study.outcomes, structure, rows),
        *_left_out(structure, left_out),
        *_unstable(structure, rows),
        *_edges([run for run in study.index.runs if run.stage == "trial"]),
        *_seeds(study.outcomes, structure, compared),
        *_without_base(structure),
        *study.notes,
        *dict.fromkeys(
            note for outcome in study.outcomes if outcome.result is not None for note in outcome.result.notes
        ),
    ]
    return tuple(dict.fromkeys(found))


def _unfinished(study: StudyResults) -> Iterator[str]:
    if study.missing:
        runs = "run has" if study.missing == 1 else "runs have"
        yield f"The study is not finished: {study.missing} {runs} no result yet."
    if study.failed:
        runs = "run was" if len(study.failed) == 1 else "runs were"
        yield f"{len(study.failed)} {runs} set aside after failing; what is said here is said without them."


def _differing(outcomes: Sequence[Outcome], structure: Structure, rows: Sequence[Row]) -> Iterator[str]:
    """What must be equal within a block for a fair comparison, and is not."""
    bases, data, epochs, rules = [], [], [], []
    for contest in structure.contests:
        where = ", ".join(contest.factors.values()) or "the study"
        found = [outcome for place in contest.members for outcome in rows[place].cell.outcomes]
        results = [outcome.result for outcome in found if outcome.result is not None]
        if len({result.model.fingerprint or result.model.source for result in results}) > 1:
            bases.append(where)
        by_seed: dict[int | None, set[str]] = {}
        for outcome in found:
            if outcome.result is not None and (source := outcome.result.data.get("train")) is not None:
                by_seed.setdefault(outcome.seed, set()).add(source.fingerprint)
        if any(len(fingerprints) > 1 for fingerprints in by_seed.values()):
            data.append(where)
        if len({round(result.training.epochs, 3) for result in results if result.training}) > 1:
            epochs.append(where)
        task = rows[contest.members[0]].task
        if len({outcome.scores[task].metric for outcome in found if task in outcome.scores}) > 1:
            rules.append(where)
    for places, what in (
        (bases, "The lines do not share one base model"),
        (data, "The lines of one seed were not trained on the same data"),
        (rules, "The lines were not scored by the same metric"),
        (epochs, "The lines were not trained for the same number of epochs"),
    ):
        if places:
            yield f"{what} ({and_list(places)})."
    yield from _other_questions(outcomes)


def _other_questions(outcomes: Sequence[Outcome]) -> Iterator[str]:
    asked: dict[str, set[int]] = {}
    for outcome in outcomes:
        for task, answers in outcome.scores.items():
            asked.setdefault(task, set()).add(hash(answers.ids))
    differing = [task for task, questions in asked.items() if len(questions) > 1]
    if differing:
        yield (
            f"Not all runs answered the same questions of {and_list(differing)}; they are compared on those that all "
            "answered, while a line's own score is over all of its own."
        )


def _left_out(structure: Structure, left_out: Sequence[int]) -> Iterator[str]:
    if left_out:
        names = list(dict.fromkeys(structure.name(place) for place in left_out))
        yield (
            f"In some blocks {and_list(names)} cannot be compared: too few seeds or questions in common with the "
            "others, or scores of single questions are not known."
        )


def _unstable(structure: Structure, rows: Sequence[Row]) -> Iterator[str]:
    """Lines that the pairs of the others must not be judged by."""
    found: dict[str, list[str]] = {}
    for contest in structure.contests:
        groups = {structure.name(place): own for place in contest.members if (own := rows[place].own) is not None}
        for name in unstable_of(groups):
            deviation = float(groups[name].values.std(ddof=1))
            where = f" on {', '.join(contest.factors.values())}" if len(structure.contests) > 1 else ""
            found.setdefault(name, []).append(f"{deviation:.1f}{where}")
    if found:
        words = and_list([f"{name} (SD {', '.join(of)})" for name, of in found.items()], most=6)
        yield (
            f"Over seeds some lines move more than {UNSTABLE:g} times as much as the middle line of their block: "
            f"{words}. The other lines are judged without them; pairs with one of them have wide intervals, and "
            "another few seeds may turn them over."
        )


def _edges(trials: Sequence[Planned]) -> Iterator[str]:
    """Values that a search chose at an end of those that it tried, with or without success: the best may lie beyond."""
    searches: dict[tuple[tuple[str, str], ...], list[Planned]] = {}
    for trial in trials:
        searches.setdefault(tuple(sorted(trial.factors.items())), []).append(trial)
    counts: Counter[str] = Counter()
    found: dict[tuple[str, str, str], list[str]] = {}
    for factors, tried in searches.items():
        method = dict(factors).get("method", "")
        counts[method] += 1
        for key, edge, value in _at_an_edge(tried):
            found.setdefault((method, key, edge), []).append(value)
    for (method, key, edge), values in found.items():
        chosen = f"{key} {and_list(list(dict.fromkeys(values)))}"
        where = f" in {len(values)} of {counts[method]} searches" if len(values) < counts[method] else ""
        further = {LARGEST: "larger", SMALLEST: "smaller"}[edge]
        yield f"{method}: the chosen {chosen} is the {edge} tried{where}; a {further} one may be better."


def _at_an_edge(tried: Sequence[Planned]) -> Iterator[tuple[str, str, str]]:
    """Key, edge and value, as it is written, of what one search chose at an edge; nothing is smaller than 0."""
    values = [_numbers(trial.tried) for trial in tried]
    for chosen in (own for own, trial in zip(values, tried, strict=True) if trial.chosen):
        for key, said in chosen.items():
            numbers = {float(each[key]) for each in values if key in each}
            if len(numbers) > 1 and float(said) == max(numbers):
                yield key, LARGEST, said
            elif len(numbers) > 1 and float(said) == min(numbers) > 0:
                yield key, SMALLEST, said


def _numbers(tried: str) -> dict[str, str]:
    """The keys of `rank 8, learning_rate 0.003` with their values; those that are words are left out."""
    pairs = [said.rpartition(" ") for said in tried.split(", ")]
    return {key.replace("_", " "): value for key, _, value in pairs if key and is_number(value)}


def _seeds(outcomes: Sequence[Outcome], structure: Structure, compared: bool) -> Iterator[str]:
    counts = {len(structure.cells[place].outcomes) for place in structure.trained}
    asked = any(answers.ids for outcome in outcomes for answers in outcome.scores.values())
    scope = f"Intervals are 95{GLUE}% and say how far a figure would move with other questions"
    if not asked:
        yield (
            f"Single questions are not known: intervals are 95{GLUE}%, of t over seeds, and say how far a figure would "
            "move with other seeds and nothing of other questions. There are no ranks and no effects of factors."
        )
    if counts and max(counts) == 1 and not asked:
        yield "Every line has one run. Nothing here tells two methods apart."
    elif counts and max(counts) == 1:
        yield f"{scope}, not with another seed: every line has one run. Nothing here tells two methods apart."
    elif counts:
        if asked:
            yield f"{scope} and other seeds."
        if min(counts) < max(counts):
            yield f"Lines have {min(counts)} to {max(counts)} seeds; those with fewer are less certain."
        if max(counts) == 2:
            yield "Two seeds say little of how much seeds matter: intervals are wide for that reason."
    if compared:
        yield "p values of the pairs in a block are corrected together (Holm); several blocks are several families."


def _without_base(structure: Structure) -> Iterator[str]:
    if not structure.bases:
        yield "There is no zero-shot run here, so gains and what was forgotten are not known."
