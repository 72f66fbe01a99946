"""How a study stands: which of its runs are known, done, set aside or waiting. Read from files, every time anew.

state = State(plan, directory)
jobs = state.pending()      # what can be run now; more is known when these are done
state.write_index()         # for the report
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from peft_mllm.errors import DataError, DiskError
from peft_mllm.files import disk_errors
from peft_mllm.rundir import RunDir
from peft_mllm.spec import Spec, SpeedSpec
from peft_mllm.study.attempts import ATTEMPTS_FOLDER, MOST_ATTEMPTS, Attempts
from peft_mllm.study.engine.jobs import Job
from peft_mllm.study.index import Index, Planned, write_index
from peft_mllm.study.plan import Plan, Run, SearchPlan, chosen_level
from peft_mllm.study.results import Result, read_result
from peft_mllm.study.wording import and_list

VISION = "vision"
"""Folder of what vision towers made of images, for all runs; it may be removed at any time."""


class State:
    """A plan in its directory.

    Args:
        plan: of the study.
        directory: of the study.
        attempts: failures after which a run is set aside.
    """

    def __init__(self, plan: Plan, directory: Path, *, attempts: int = MOST_ATTEMPTS) -> None:
        self.plan, self.directory = plan, directory
        self.attempts = Attempts(directory / ATTEMPTS_FOLDER, most=attempts)
        self._verified: set[str] = set()
        self._scores: dict[str, tuple[float, float]] = {}

    # --- runs ---

    def known(self) -> list[Run]:
        """All runs whose spec is known now; those that count are known when their search is decided."""
        runs = [*self.plan.references, *self.plan.trials]
        for combination in self.plan.combinations:
            search = self.plan.searches.get(self.plan.search_of(combination))
            if search is None:
                runs += self.plan.finals(combination, None)
            elif (place := self._chosen(search)) is not None:
                runs += self.plan.finals(combination, search.levels[place])
        return list({run.id: run for run in runs}.values())

    def pending(self) -> list[Job]:
        """What has no verified result, in the order in which it should run."""
        return [self.job(run) for run in self.known() if not self.is_done(run)]

    def job(self, run: Run) -> Job:
        """A run as an engine takes it."""
        directory = self.directory / run.directory
        spec = run.spec.model_copy(update={"output_dir": str(directory), "speed": self._speed(run.spec)})
        return Job(run.id, run.title, directory, spec.model_dump(mode="json"))

    def _speed(self, spec: Spec) -> SpeedSpec:
        """Runs with a frozen vision tower share what it makes of images, in the study's folder unless told where."""
        if spec.vision == "tuned" or spec.speed.vision_cache is not None or not spec.speed.vision_cache_gb:
            return spec.speed
        return spec.speed.model_copy(update={"vision_cache": str(self.directory / VISION)})

    def is_done(self, run: Run) -> bool:
        """Whether the run's result is there and is what was written; a damaged one is not, and the run says so."""
        if run.id not in self._verified:
            try:
                done = RunDir(self.directory / run.directory).result() is not None
            except DiskError:
                return False
            if not done:
                return False
            self._verified.add(run.id)
        return True

    def set_aside(self, run: Run) -> str | None:
        """Why a run is not tried again; None if it is."""
        return self.attempts.set_aside(run.id)

    def finished(self) -> list[Result]:
        """The results that are there, without their predictions' text; for estimates."""
        found = []
        for run in self.known():
            try:
                found += [read_result(self.directory / run.directory)] if self.is_done(run) else []
            except (DataError, DiskError):
                continue  # the run itself will say so
        return found

    # --- the search ---

    def _chosen(self, search: SearchPlan) -> int | None:
        """The place of the chosen trial; None while trials are under way, or where all were set aside."""
        if not all(self.is_done(run) or self.set_aside(run) for run in search.runs):
            return None
        return chosen_level(search, [self._score(run) if self.is_done(run) else None for run in search.runs])

    def _score(self, run: Run) -> tuple[float, float]:
        """A trial's validation score and lowest validation loss."""
        if run.id not in self._scores:
            result = read_result(self.directory / run.directory)
            best = result.training.best if result.training else None
            loss = float(best["eval_loss"]) if best else float("inf")
            self._scores[run.id] = (next(iter(result.scores.values())).headline, loss)
        return self._scores[run.id]

    # --- the index ---

    def write_index(self) -> Index:
        """Write the study's own file, and return it.

        Raises:
            DiskError: it cannot be written.
        """
        study, plan = self.plan.study, self.plan
        index = Index(
            title=study.title,
            question=study.question,
            protocol=study.protocol,
            facts=tuple(self._facts()),
            contrast=study.contrast,
            axes={name: self._labels(name) for name in plan.axes if name != "seed"},
            seen=study.seen,
            runs=tuple(self._planned()),
            expected=plan.expected,
            definition=study.model_dump(mode="json"),
        )
        with disk_errors(self.directory, "the study"):
            self.directory.mkdir(parents=True, exist_ok=True)
        write_index(self.directory, index)
        return index

    def _labels(self, axis: str) -> tuple[str, ...]:
        """Of an axis, in its order; zero-shot stands before the methods."""
        used = {run.factors[axis] for run in self.plan.references}
        labels = (*self.plan.axes[axis].labels(), *(c.factors[axis] for c in self.plan.combinations))
        return tuple(dict.fromkeys([*(label for label in used if label not in labels), *labels]))

    def _planned(self) -> Iterator[Planned]:
        chosen = {
            search.runs[place].id
            for search in self.plan.searches.values()
            if (place := self._chosen(search)) is not None
        }
        values = {
            run.id: search.levels[place].label
            for combination in self.plan.combinations
            if (search := self.plan.searches.get(self.plan.search_of(combination))) is not None
            and (place := self._chosen(search)) is not None
            for run in self.plan.finals(combination, search.levels[place])
        }
        for run in self.known():
            planned = Planned(run.id, run.directory, run.stage, run.factors, run.seed, run.tried)
            yield replace(planned, chosen=run.id in chosen, values=values.get(run.id, ""))

    def _facts(self) -> Iterator[tuple[str, str]]:
        """The protocol in words, for the reader of the report."""
        study, plan = self.plan.study, self.plan
        if study.protocol == "paper":
            yield "protocol", "as in the paper: hyperparameters as the study gives them, without a search"
        else:
            yield "protocol", "fair: every method had the same number of trials, chosen on validation data"
        if study.search is not None and plan.searches:
            trials = next(iter(plan.searches.values())).levels
            where = and_list([f"{axis} {label}" for axis, label in study.search.on.items()], most=8)
            yield (
                "trials for each method",
                f"{len(trials)}, with seed {study.search.seed}"
                + (f", on {where} and taken for all" if where else ", in every cell"),
            )
        yield "seeds", ", ".join(map(str, plan.seeds))
        yield "data order", "a function of the seed: the same for all methods"
        yield "test data", "scored once by each run that counts, at its end, and by no trial"
