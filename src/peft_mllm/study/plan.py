"""The runs of a study: trials first, then what counts, with the values that the trials chose.

A plan is a pure function of the study's definition; which trial was chosen comes from the result files. So the
same command finds the same runs on any day and machine, and a study that grew runs only what is new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from peft_mllm.errors import SpecError
from peft_mllm.shelf import did_you_mean
from peft_mllm.spec import Spec
from peft_mllm.specfile import parse_spec
from peft_mllm.study.axes import Axis, Level, axes_of, flat, levels_of_method, method_name, put
from peft_mllm.study.definition import Study
from peft_mllm.study.index import Stage
from peft_mllm.study.outcomes import NOT_VARIED, ZERO_SHOT

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
    """

    factors: Mapping[str, str]
    values: Mapping[str, Any]
    method: Level


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
        SpecError: an axis, an exclusion or the search cannot be; or a run's spec cannot, with its labels.
    """

    def __init__(self, study: Study, *, matched: Axis | None = None) -> None:
        self.study = study
        self.axes = axes_of(study.axes) | ({"parameters": matched} if matched else {})
        self.seeds = self._seeds()
        self._refuse_unknown_labels()
        self.combinations = tuple(self._combinations())
        if study.protocol == "fair":
            self._refuse_unfair()
        self.searches = self._searches()

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
                fixed | rows | values | {"method": "none", "seed": 0}, factors | {"method": ZERO_SHOT}, "final", None
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
            self._run({**self._fixed, **combination.values, **tried, "seed": seed}, combination.factors, "final", seed)
            for seed in self.seeds
        ]

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
            raise SpecError("axes.seed: seeds are whole numbers.")
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
                yield Combination(factors, values, method)

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
                raise SpecError(f"search.on: there is no {_labels(combination.factors)} with {labels} to try it on.")
            plans[key] = self._search(places[key])
        return plans

    def _search(self, at: Combination) -> SearchPlan:
        search = self.study.search
        assert search is not None
        levels = levels_of_method(search.trials[at.method.label], f"search.trials.{at.method.label}")
        for level in levels:
            if twice := sorted(level.values.keys() & at.values.keys()):
                raise SpecError(f"search.trials.{at.method.label}: {twice[0]} is set by an axis already.")
        runs = tuple(
            self._run(
                {**self._fixed, **at.values, **level.values, "seed": search.seed, **_TRIAL},
                at.factors,
                "trial",
                search.seed,
                level.label,
            )
            for level in levels
        )
        return SearchPlan(at, levels, runs)

    def _key(self, factors: Mapping[str, str]) -> tuple[str, ...]:
        on = self.study.search.on if self.study.search else {}
        return tuple(label for axis, label in factors.items() if axis not in on)

    def _run(
        self, values: Mapping[str, Any], factors: Mapping[str, str], stage: Stage, seed: int | None, tried: str = ""
    ) -> Run:
        data: dict[str, Any] = {}
        put(data, values)
        task = _name_of(data.get("task"))
        data["evaluate"] = [each for each in data.get("evaluate", ()) if _name_of(each) != task]
        data["output_dir"] = "-"
        data["name"] = factors["method"]
        try:
            spec = parse_spec(data)
        except SpecError as error:
            raise SpecError(f"in the run {_labels(factors)}: {error}") from None
        directory = f"{RUNS}/{spec.method.name}-{spec.task.name}-{spec.id}"
        return Run(spec.model_copy(update={"output_dir": directory}), stage, factors, seed, tried)

    # --- what cannot be ---

    def _refuse_unknown_labels(self) -> None:
        rules = [(f"exclude[{i}]", rule) for i, rule in enumerate(self.study.exclude)]
        rules += [("search.on", self.study.search.on)] if self.study.search else []
        for place, axis, said in ((place, axis, said) for place, rule in rules for axis, said in rule.items()):
            if axis not in self._axis_names:
                raise SpecError(f"{place}: there is no axis '{axis}'. {did_you_mean(axis, self._axis_names)}")
            known = [*self.axes[axis].labels(), NOT_VARIED]
            for unknown in (label for label in _listed(said) if label not in known):
                raise SpecError(f"{place}: {axis} has no '{unknown}'. {did_you_mean(unknown, known)}")
        if self.study.contrast not in self._axis_names:
            meant = did_you_mean(self.study.contrast, self._axis_names)
            raise SpecError(f"contrast: there is no axis '{self.study.contrast}'. {meant}")

    def _refuse_unfair(self) -> None:
        """The fair protocol asks for seeds, and for the same trials for everybody."""
        instead = "Or say `protocol: paper`: the values are then taken as they are, and the report says so."
        if len(set(self.seeds)) < LEAST_SEEDS:
            raise SpecError(f"axes.seed: the fair protocol needs at least {LEAST_SEEDS} seeds. {instead}")
        search = self.study.search
        if search is None:
            raise SpecError(f"search: the fair protocol needs trials for every method. {instead}")
        if search.seed in self.seeds:
            raise SpecError(f"search.seed: {search.seed} is a seed of the study; the trials need one of their own.")
        trained = dict.fromkeys(c.method.label for c in self.combinations if method_name(c.method) != "none")
        if lacking := [label for label in trained if label not in search.trials]:
            raise SpecError(f"search.trials: '{lacking[0]}' has none. {instead}")
        if unknown := [label for label in search.trials if label not in trained]:
            raise SpecError(
                f"search.trials: there is no method '{unknown[0]}'. {did_you_mean(unknown[0], list(trained))}"
            )
        counts = {label: len(levels_of_method(search.trials[label], f"search.trials.{label}")) for label in trained}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{label} {count}" for label, count in counts.items())
            raise SpecError(f"search.trials: the fair protocol gives every method the same number of trials ({said}).")


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
