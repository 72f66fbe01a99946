"""Which method to take, from what studies found: those that cannot be told apart at the top within given limits.

Evidence of the same model and task is direct. That of the same model on other tasks is weaker: the mean over those.
Another model is no evidence, and is shown as that. One seed tells no two methods apart, so it is none either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import numpy as np

from peft_mllm.study.analysis import Difference, Line
from peft_mllm.study.evidence import Candidate, Choice, Evidence, Setting
from peft_mllm.study.inference.differences import LEVEL
from peft_mllm.study.ledger import DISK, MEMORY, SECONDS, TRAINABLE
from peft_mllm.study.paper.names import canonical_task, paper_model
from peft_mllm.study.statistics import Estimate

FORGOTTEN = "forgotten"
Kind = Literal["direct", "other tasks", "other model"]


@dataclass(frozen=True)
class Limits:
    """What a choice may cost; None is no limit.

    Attributes:
        memory: peak bytes of training.
        disk: bytes of the adapter.
        seconds: of training.
        forgotten: points lost on seen tasks.
        connector: frozen or tuned; empty for either.
    """

    memory: float | None = None
    disk: float | None = None
    seconds: float | None = None
    forgotten: float | None = None
    connector: str = ""

    def known(self) -> Iterator[tuple[str, float]]:
        """The limits that there are, by the name of the figure."""
        named = ((MEMORY, self.memory), (DISK, self.disk), (SECONDS, self.seconds), (FORGOTTEN, self.forgotten))
        yield from ((name, limit) for name, limit in named if limit is not None)


@dataclass(frozen=True)
class Option:
    """A candidate with what it costs.

    Attributes:
        setting: how it was made; of several tasks, as on the first.
        sd: over seeds; None for one seed, or for several tasks.
        gain: over zero-shot; of several tasks the mean, without an interval.
        forgotten: likewise.
        figures: of the ledger; of several tasks the mean, of memory the highest.
        exceeds: limits that it breaks.
        unknown: limits for which it has no figure.
        uncertain: whether the interval of what it forgot reaches beyond the limit.
        runs: what it rests on.
    """

    name: str
    setting: Setting
    seeds: int
    score: Estimate
    sd: float | None
    gain: Estimate | None
    forgotten: Estimate | None
    figures: Mapping[str, float]
    exceeds: tuple[str, ...]
    unknown: tuple[str, ...]
    uncertain: bool
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What one study says of one model.

    Attributes:
        kind: how near it is to what was asked.
        model: as the study calls it.
        tasks: likewise.
        top: the highest within the limits and all that are not told apart from it; highest first.
        lower: told apart from the highest.
        excluded: by the limits.
        seeds, questions: that the comparisons rest on.
        apart_by: the largest difference between the highest and another of `top` that is not ruled out; None where
            there is one alone, or no interval.
        above: of `excluded`, those that are told apart from the highest, and above.
        unmeasured: whether what is forgotten is limited, and was measured of no candidate.
    """

    kind: Kind
    evidence: Evidence
    model: str
    tasks: tuple[str, ...]
    top: tuple[Option, ...]
    lower: tuple[Option, ...]
    excluded: tuple[Option, ...]
    seeds: int
    questions: int
    apart_by: float | None
    above: tuple[str, ...]
    unmeasured: bool

    @property
    def answers(self) -> bool:
        """Whether something may be concluded: several seeds, and something that is known to be within the limits."""
        return self.seeds > 1 and bool(self.top) and not self.unmeasured


@dataclass(frozen=True)
class Advice:
    """The answer.

    Attributes:
        verdict: the strongest that answers; None where evidence is missing.
        others: further ones of the same model, the strongest first.
        elsewhere: on other models; no answer.
    """

    model: str
    task: str
    limits: Limits
    verdict: Verdict | None
    others: tuple[Verdict, ...]
    elsewhere: tuple[Verdict, ...]


def advise(evidence: Sequence[Evidence], model: str, task: str, limits: Limits) -> Advice:
    """Answer from evidence.

    Args:
        evidence: of studies.
        model: directory, hub id, or a study's label.
        task: name on the shelf, or a study's label.
        limits: what the choice may cost.
    """
    own: list[Verdict] = []
    elsewhere: list[Verdict] = []
    for each in evidence:
        for choice in each.choices:
            kind = _kind(each, choice, model, task)
            if kind is not None:
                (elsewhere if kind == "other model" else own).append(_verdict(kind, each, choice, limits))
    own.sort(key=_strength)
    verdict = own[0] if own and own[0].answers else None
    return Advice(
        model=model,
        task=task,
        limits=limits,
        verdict=verdict,
        others=tuple(own[1:] if verdict else own),
        elsewhere=tuple(sorted(elsewhere, key=_strength)),
    )


def _strength(verdict: Verdict) -> tuple[bool, bool, int, int, int, str]:
    """What answers comes first, then what is direct, then what rests on more."""
    return (
        not verdict.answers,
        verdict.kind != "direct",
        -len(verdict.tasks),
        -verdict.seeds,
        -verdict.questions,
        verdict.evidence.place,
    )


# --- what evidence is of ---


def _kind(evidence: Evidence, choice: Choice, model: str, task: str) -> Kind | None:
    """What a choice says of a model and task; None where another one of the study says more."""
    source = _first(evidence, choice).model
    if not source and not choice.model:
        return None  # a table that does not say
    same = same_model(model, source, choice.model)
    if len(choice.tasks) == 1 and _is_on(task, evidence, choice):
        return "direct" if same else "other model"
    siblings = [each for each in evidence.choices if each.model == choice.model]
    if any(_is_on(task, evidence, each) for each in siblings):
        return None
    if len(choice.tasks) == 1 and any(len(each.tasks) > 1 for each in siblings):
        return None
    return "other tasks" if same else "other model"


def _is_on(task: str, evidence: Evidence, choice: Choice) -> bool:
    """Whether a choice is on a task, be it among others."""
    names = [evidence.settings[place].task for place in choice.candidates[0].lines]
    return any(same_task(task, name, label) for name, label in zip(names, choice.tasks, strict=True))


def _first(evidence: Evidence, choice: Choice) -> Setting:
    return evidence.settings[choice.candidates[0].lines[0]]


def same_model(asked: str, source: str, label: str) -> bool:
    """Whether a study's model is the one asked for: by name, by the last part of its path, or as the paper calls it."""
    if asked in (source, label):
        return bool(asked)
    one, two = Path(asked), Path(source)
    if one.is_dir() and two.is_dir():
        return one.samefile(two)
    names = {PurePath(name).name.lower() for name in (source, label) if name}
    paper = paper_model(asked)
    return PurePath(asked).name.lower() in names or (bool(paper) and paper in (paper_model(source), paper_model(label)))


def same_task(asked: str, name: str, label: str) -> bool:
    """Whether a study's task is the one asked for, by its name on the shelf or by its label."""
    known = {each.lower() for each in (name, label, canonical_task(name), canonical_task(label)) if each}
    return bool({asked.lower(), canonical_task(asked).lower()} & known)


# --- what it says ---


def _verdict(kind: Kind, evidence: Evidence, choice: Choice, limits: Limits) -> Verdict:
    every = [_option(candidate, evidence, limits) for candidate in choice.candidates]
    if limits.connector:
        every = [option for option in every if option.setting.connector in ("", limits.connector)]
    within = [option for option in every if not option.exceeds]
    excluded = [option for option in every if option.exceeds]
    pairs = {frozenset((each.first, each.second)): each for each in choice.differences}
    first = within[0].name if within else ""
    seeds = choice.seeds or min((option.seeds for option in within), default=0)
    apart = {option.name for option in every if seeds > 1 and _told_apart(pairs.get(frozenset((first, option.name))))}
    top = [option for option in within if option.name not in apart]
    possible = [
        bound for option in top[1:] if (bound := _furthest(pairs.get(frozenset((first, option.name))))) is not None
    ]
    return Verdict(
        kind=kind,
        evidence=evidence,
        model=choice.model or _first(evidence, choice).model,
        tasks=choice.tasks,
        top=tuple(top),
        lower=tuple(option for option in within if option.name in apart),
        excluded=tuple(excluded),
        seeds=seeds,
        questions=choice.questions,
        apart_by=max(possible, default=None),
        above=tuple(
            option.name for option in excluded if option.name in apart and option.score.value > within[0].score.value
        ),
        unmeasured=bool(every) and all(FORGOTTEN in option.unknown for option in every),
    )


def _told_apart(found: Difference | None) -> bool:
    return found is not None and found.p_adjusted is not None and found.p_adjusted < LEVEL


def _furthest(found: Difference | None) -> float | None:
    if found is None or found.low is None or found.high is None:
        return None
    return max(abs(found.low), abs(found.high))


def _option(candidate: Candidate, evidence: Evidence, limits: Limits) -> Option:
    lines = [evidence.lines[place] for place in candidate.lines]
    settings = [evidence.settings[place] for place in candidate.lines]
    forgotten = _mean([line.forgotten for line in lines])
    costs = {name: _figure(lines, name) for name in (TRAINABLE, SECONDS, MEMORY, DISK)}
    figures = {name: value for name, value in costs.items() if value is not None}
    known = figures | ({FORGOTTEN: forgotten.value} if forgotten else {})
    return Option(
        name=candidate.name,
        setting=settings[0],
        seeds=min(line.seeds for line in lines),
        score=candidate.score,
        sd=lines[0].sd if len(lines) == 1 else None,
        gain=_mean([line.gain for line in lines]),
        forgotten=forgotten,
        figures=figures,
        exceeds=tuple(name for name, limit in limits.known() if name in known and known[name] > limit),
        unknown=tuple(name for name, _ in limits.known() if name not in known),
        uncertain=_uncertain(forgotten, limits.forgotten),
        runs=tuple(run for setting in settings for run in setting.runs),
    )


def _uncertain(forgotten: Estimate | None, limit: float | None) -> bool:
    if forgotten is None or forgotten.high is None or limit is None:
        return False
    return forgotten.value <= limit < forgotten.high


def _figure(lines: Sequence[Line], name: str) -> float | None:
    """Over tasks; None where one has none."""
    values = [line.figures[name] for line in lines if name in line.figures]
    if len(values) < len(lines):
        return None
    return max(values) if name == MEMORY else float(np.mean(values))


def _mean(each: Sequence[Estimate | None]) -> Estimate | None:
    known = [one for one in each if one is not None]
    if len(known) < len(each):
        return None
    return known[0] if len(known) == 1 else Estimate(float(np.mean([one.value for one in known])))
