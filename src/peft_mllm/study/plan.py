"""The runs of a study: trials first, then what counts, with the values that the trials chose.

A plan is a pure function of the study's definition; which trial was chosen comes from the result files. So the
same command finds the same runs on any day and machine, and a study that grew runs only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from peft_mllm.document import Key
from peft_mllm.errors import SpecError
from peft_mllm.shelf import did_you_mean
from peft_mllm.spec import Spec
from peft_mllm.specfile import parse_spec
from peft_mllm.study.axes import Axis, Level, axes_of, flat, levels_of_method, method_name, put, said_at
from peft_mllm.study.definition import Study, UnfitError
from peft_mllm.study.index import Stage
from peft_mllm.study.outcomes import NOT_VARIED, ZERO_SHOT
from peft_mllm.study.wording import and_list
from peft_mllm.tasks import TASKS

LEAST_SEEDS = 3
"""Of the fair protocol: with fewer there is no saying how far a figure moves with the seed."""
RUNS = "runs"
"""Folder of the run directories, in the study's."""

# What decides an answer of a base that is not trained; all else in a spec is about training.
_OF_THE_BASE = ("model", "task", "evaluate", "generation", "data.max_eval_samples", "data.max_length")
_TRIAL = {"scored": "validation", "evaluate": [], "retention": {"text": False, "samples": 0}, "curve": {}}
"""A trial is scored on validation data of its own task and on nothing else."""


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        spec: with its directory, `<study>/runs/<method>-<task>-<id>`.
        factors: label by axis, without the seed.
        seed: None where nothing is drawn.
        tried: what a trial tries, in words.
    """

    spec: Spec
    stage: Stage
    factors: Mapping[str, str]
    seed: int | None
    tried: str = ""

    @cached_property
    def id(self) -> str:
        """Of its spec; equal for equal outcomes."""
        return self.spec.id

    @property
    def directory(self) -> str:
        """Relative to the study's."""
        return self.spec.output_dir

    @property
    def title(self) -> str:
        """In words, for a person who waits."""
        labels = [label for label in self.factors.values() if label != NOT_VARIED]
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        return " · ".join([*labels, *([f"trial: {self.tried}"] if self.tried else seed)])


@dataclass(frozen=True)
class Combination:
    """One label of each axis but the seed.

    Attributes:
        values: what they set, by dotted key of a spec.
        method: the level of the axis `method`.
        levels: of all axes, the method's first.
    """

    factors: Mapping[str, str]
    values: Mapping[str, Any]
    method: Level
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class SearchPlan:
    """The trials of one combination: from them one is chosen for all combinations that share the search."""

    combination: Combination
    levels: tuple[Level, ...]
    runs: tuple[Run, ...]


class Plan:
    """All runs of a study.

    Args:
        study: its definition.
        matched: the axis of computed sizes (matched.py), where the study asks for one.

    Raises:
        SpecError: an axis, an exclusion or the search cannot be; or a run's spec cannot, with its labels. With file
            and line where the study was read from a file.
    """

    def __init__(self, study: Study, *, matched: Axis | None = None) -> None:
        self.study = study
        with study.naming_places():
            self.axes = axes_of(study.axes) | ({"parameters": matched} if matched else {})
            self.seeds = self._seeds()
            self._refuse_unknown_labels()
            self._refuse_unknown_tasks()
            self.combinations = tuple(self._combinations())
            if study.protocol == "fair":
                self._refuse_unfair()
            self.searches = self._searches()
            self._try_each()

    # --- what runs ---

    @property
    def expected(self) -> int:
        """How many runs the whole study has."""
        return len(self.references) + len(self.trials) + len(self.combinations) * len(self.seeds)

    @cached_property
    def references(self) -> tuple[Run, ...]:
        """The base as it is, once for each model and task: nothing is drawn, so there is one seed."""
        axes = [axis for name, axis in self.axes.items() if name != "seed" and any(map(_of_base, axis.levels))]
        found: dict[str, Run] = {}
        for levels in product(*(axis.levels for axis in axes)):
            factors = dict.fromkeys(self._axis_names, NOT_VARIED) | {
                axis.name: level.label for axis, level in zip(axes, levels, strict=True)
            }
            values: dict[str, Any] = {}
            for level in levels:
                values |= {key: value for key, value in level.values.items() if _decides_answers(key)}
            fixed = {key: value for key, value in self._fixed.items() if _decides_answers(key)}
            rows = {key: value for key, value in self._fixed.items() if key == "train.per_device_eval_batch_size"}
            run = self._run(
                fixed | rows | values | {"method": "none", "seed": 0},
                factors | {"method": ZERO_SHOT},
                "final",
                None,
                levels,
            )
            found.setdefault(run.id, run)
        return tuple(found.values())

    @cached_property
    def trials(self) -> tuple[Run, ...]:
        """Of all searches; equal ones once."""
        return tuple({run.id: run for search in self.searches.values() for run in search.runs}.values())

    def finals(self, combination: Combination, chosen: Level | None) -> list[Run]:
        """The runs of one combination that count, one for each seed, with what was chosen for it."""
        tried = chosen.values if chosen else {}
        return [
            self._run(
                {**self._fixed, **combination.values, **tried, "seed": seed},
                combination.factors,
                "final",
                seed,
                (*combination.levels, *([chosen] if chosen else [])),
            )
            for seed in self.seeds
        ]

    def notes(self) -> Iterator[str]:
        """What may not be meant: a method that an axis `by: method` says nothing of."""
        for name, axis in self.axes.items():
            if name in self.study.axes and axis.by_method is not None:
                left = [each.label for each in self.axes["method"].levels if each.label not in axis.by_method]
                if left := [each for each in left if any(each == c.method.label for c in self.combinations)]:
                    yield f"axes.{name} says nothing of {and_list(left)}, which is there once, without a level of it."

    def search_of(self, combination: Combination) -> tuple[str, ...]:
        """Which search serves a combination: its labels, where the trials are made."""
        return self._key(combination.factors)

    # --- how it is made ---

    @property
    def _axis_names(self) -> list[str]:
        return [name for name in self.axes if name != "seed"]

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        return dict(flat(self.study.fixed))

    def _seeds(self) -> tuple[int, ...]:
        axis = self.axes.get("seed")
        values = [level.values["seed"] for level in axis.levels] if axis else [self.study.fixed.get("seed", 42)]
        if not all(isinstance(value, int) for value in values):
            raise UnfitError(("axes", "seed"), "seeds are whole numbers.")
        return tuple(values)

    def _combinations(self) -> Iterator[Combination]:
        """Every combination that is not excluded, once."""
        seen = set()
        others = [axis for name, axis in self.axes.items() if name not in ("method", "seed")]
        for method in self.axes["method"].levels:
            for levels in product(*(axis.levels_for(method) for axis in others)):
                labels = {"method": method.label} | {a.name: lv.label for a, lv in zip(others, levels, strict=True)}
                factors = {name: labels[name] for name in self._axis_names}
                if tuple(factors.values()) in seen or any(_matches(rule, factors) for rule in self.study.exclude):
                    continue
                seen.add(tuple(factors.values()))
                values: dict[str, Any] = dict(method.values)
                for level in levels:
                    values |= level.values
                yield Combination(factors, values, method, (method, *levels))

    def _searches(self) -> dict[tuple[str, ...], SearchPlan]:
        search = self.study.search
        if search is None:
            return {}
        places = {self._key(c.factors): c for c in self.combinations if _matches(search.on, c.factors)}
        plans = {}
        for combination in self.combinations:
            key = self._key(combination.factors)
            if key in plans:
                continue
            if key not in places:
                labels = ", ".join(f"{axis} {label}" for axis, label in search.on.items())
                said = f"there is no {_labels(combination.factors)} with {labels} to try it on."
                raise UnfitError(("search", "on"), said)
            plans[key] = self._search(places[key])
        return plans

    def _search(self, at: Combination) -> SearchPlan:
        search = self.study.search
        assert search is not None
        place = ("search", "trials", at.method.label)
        levels = levels_of_method(search.trials[at.method.label], place)
        for level in levels:
            if twice := sorted(level.values.keys() & at.values.keys()):
                raise UnfitError(place, f"{twice[0]} is set by an axis already.")
        runs = tuple(
            self._run(
                {**self._fixed, **at.values, **level.values, "seed": search.seed, **_TRIAL},
                at.factors,
                "trial",
                search.seed,
                (*at.levels, level),
                level.label,
            )
            for level in levels
        )
        return SearchPlan(at, levels, runs)

    def _key(self, factors: Mapping[str, str]) -> tuple[str, ...]:
        on = self.study.search.on if self.study.search else {}
        return tuple(label for axis, label in factors.items() if axis not in on)

    def _run(
        self,
        values: Mapping[str, Any],
        factors: Mapping[str, str],
        stage: Stage,
        seed: int | None,
        levels: Sequence[Level],
        tried: str = "",
    ) -> Run:
        data: dict[str, Any] = {}
        put(data, values)
        task = _name_of(data.get("task"))
        asked = data.get("evaluate", ())
        kept = [place for place, each in enumerate(asked) if _name_of(each) != task]
        data["evaluate"] = [asked[place] for place in kept]
        data["output_dir"] = "-"
        data["name"] = factors["method"]

        def place(key: Key) -> str:
            if len(key) > 1 and key[0] == "evaluate" and isinstance(key[1], int) and key[1] < len(kept):
                key = ("evaluate", kept[key[1]], *key[2:])
            return self._place_of(key, levels)

        try:
            spec = parse_spec(data, place=place if self.study.place(()) else None)
        except SpecError as error:
            raise SpecError(f"{error} (In the run {_labels(factors)}.)") from None
        self._refuse_nothing_to_score(spec, place, factors)
        directory = f"{RUNS}/{spec.method.name}-{spec.task.name}-{spec.id}"
        return Run(spec.model_copy(update={"output_dir": directory}), stage, factors, seed, tried)

    def _place_of(self, key: Key, levels: Sequence[Level]) -> str:
        """Where the study says a key of a run's spec: in the last level that sets it, or among what is fixed."""
        found = next(([*level.said_at(key)] for level in reversed(levels) if level.said_at(key)), [])
        for name in self._fixed if not found else ():
            found += said_at(("fixed",), name, key)
        return self.study.place(*(found or [("fixed", *key)]))

    # --- what cannot be ---

    def _try_each(self) -> None:
        """Runs that are not known before their trials are done: what cannot be is said before the trials train."""
        for c in self.combinations if self.searches else ():
            self._run({**self._fixed, **c.values, "seed": self.seeds[0]}, c.factors, "final", None, c.levels)

    def _refuse_nothing_to_score(self, spec: Spec, place: Callable[[Key], str], factors: Mapping[str, str]) -> None:
        """A generated task whose split is empty would give a run without a score, after all of its training."""
        tasks: list[tuple[Key, Any]] = [(("task",), spec.task)]
        tasks += [(("evaluate", i), task) for i, task in enumerate(spec.evaluate)]
        for key, task in tasks:
            size = task.options.get("size")
            if isinstance(size, Mapping) and not size.get(spec.scored, 0):
                key = (*key, "size", spec.scored)
                where = f"{place(key)}: " if place(key) else ""
                raise SpecError(
                    f"{where}{'.'.join(map(str, key))}: {task.name} has no question there, so there is nothing to "
                    f"score. (In the run {_labels(factors)}.)"
                )

    def _refuse_unknown_tasks(self) -> None:
        known = [*dict.fromkeys([*TASKS, *self.axes["task"].labels()])]
        for i, task in enumerate(self.study.seen):
            if task not in known:
                raise UnfitError(("seen", i), f"there is no task '{task}'. {did_you_mean(task, known)}")

    def _refuse_unknown_labels(self) -> None:
        rules: list[tuple[Key, Mapping[str, Any]]]
        rules = [(("exclude", i), rule) for i, rule in enumerate(self.study.exclude)]
        rules += [(("search", "on"), self.study.search.on)] if self.study.search else []
        for place, axis, said in ((place, axis, said) for place, rule in rules for axis, said in rule.items()):
            if axis not in self._axis_names:
                known = did_you_mean(axis, self._axis_names)
                raise UnfitError((*place, axis), f"there is no axis '{axis}'. {known}")
            labels = [*self.axes[axis].labels(), NOT_VARIED]
            for unknown in (label for label in _listed(said) if label not in labels):
                raise UnfitError((*place, axis), f"{axis} has no '{unknown}'. {did_you_mean(unknown, labels)}")
        if self.study.contrast not in self._axis_names:
            meant = did_you_mean(self.study.contrast, self._axis_names)
            raise UnfitError(("contrast",), f"there is no axis '{self.study.contrast}'. {meant}")

    def _refuse_unfair(self) -> None:
        """The fair protocol asks for seeds, and for the same trials for everybody."""
        instead = "Or say `protocol: paper`: the values are then taken as they are, and the report says so."
        if len(set(self.seeds)) < LEAST_SEEDS:
            raise UnfitError(("axes", "seed"), f"the fair protocol needs at least {LEAST_SEEDS} seeds. {instead}")
        search = self.study.search
        if search is None:
            raise UnfitError(("search",), f"the fair protocol needs trials for every method. {instead}")
        if search.seed in self.seeds:
            said = f"{search.seed} is a seed of the study; the trials need one of their own."
            raise UnfitError(("search", "seed"), said)
        trained = dict.fromkeys(c.method.label for c in self.combinations if method_name(c.method) != "none")
        if lacking := [label for label in trained if label not in search.trials]:
            raise UnfitError(("search", "trials"), f"'{lacking[0]}' has none. {instead}")
        if unknown := [label for label in search.trials if label not in trained]:
            known = did_you_mean(unknown[0], list(trained))
            raise UnfitError(("search", "trials", unknown[0]), f"there is no method '{unknown[0]}'. {known}")
        counts = {label: len(levels_of_method(search.trials[label], ("search", "trials", label))) for label in trained}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{label} {count}" for label, count in counts.items())
            same = f"the fair protocol gives every method the same number of trials ({said})."
            raise UnfitError(("search", "trials"), same)


def _matches(rule: Mapping[str, Any], factors: Mapping[str, str]) -> bool:
    """Whether a combination has the labels of a rule: one, or one of several, for each axis named."""
    return all(factors[axis] in _listed(labels) for axis, labels in rule.items())


def _listed(labels: Any) -> list[str]:
    return [str(label) for label in (labels if isinstance(labels, list) else [labels])]


def _decides_answers(key: str) -> bool:
    return any(key == of_base or key.startswith(f"{of_base}.") for of_base in _OF_THE_BASE)


def _of_base(level: Level) -> bool:
    return any(map(_decides_answers, level.values))


def _name_of(task: Any) -> str:
    return str(task.get("name")) if isinstance(task, Mapping) else str(task)


def _labels(factors: Mapping[str, str]) -> str:
    return " / ".join(label for label in factors.values() if label != NOT_VARIED)


def chosen_level(search: SearchPlan, scores: Sequence[tuple[float, float] | None]) -> int | None:
    """Which trial is chosen: the highest validation score, of equals the lowest validation loss, then the first.

    Args:
        search: the trials.
        scores: (score, loss) of each trial in order; None for one that was set aside.

    Returns:
        its place, or None where every trial was set aside.
    """
    done = [(-score[0], score[1], place) for place, score in enumerate(scores) if score is not None]
    return min(done)[2] if done else None
