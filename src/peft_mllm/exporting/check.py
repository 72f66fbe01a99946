"""What an approximation costs on the run's own questions: each task's figure and answer loss, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_mllm.data.supply import measure_with
from peft_mllm.errors import SpecError
from peft_mllm.exporting.probe import answer_loss
from peft_mllm.saved import Target
from peft_mllm.scored import score
from peft_mllm.screen import Screen
from peft_mllm.specfile import build, parse_spec
from peft_mllm.splits import Opened, open_split
from peft_mllm.tasks import TASKS
from peft_mllm.tuned import Tuned
from peft_mllm.world import World


class Checker:
    """Asks the first test questions of each task of a run, once before and once after."""

    def __init__(self, target: Target, questions: int, screen: Screen):
        if not target.spec:
            raise SpecError("check asks the questions of a run's own tasks, and a PEFT directory has none.")
        self._spec = parse_spec({**target.spec, "output_dir": "unused"})
        self._questions, self._screen, self._asked = questions, screen, None

    def before(self, tuned: Tuned) -> dict[str, Any]:
        """Each task's figure, score and answer loss."""
        return self._ask(tuned)

    def after(self, tuned: Tuned, before: Mapping[str, Any]) -> dict[str, Any]:
        """Figure and number of questions of each task, with score and loss as [before, after]."""
        found = self._ask(tuned)
        return {
            task: each | {key: [before[task][key], each[key]] for key in ("score", "loss")}
            for task, each in found.items()
        }

    def _ask(self, tuned: Tuned) -> dict[str, Any]:
        found = {}
        for opened in self._open(tuned):
            scores = score(opened, tuned, self._spec, world=World(), screen=self._screen)
            figure, value = next(iter(scores["values"].items()))
            loss = answer_loss(tuned, opened.records)
            found[opened.name] = {"figure": figure, "n": scores["n"], "score": value, "loss": loss}
        return found

    def _open(self, tuned: Tuned) -> list[Opened]:
        measure = measure_with(tuned.family.encode, self._spec.data.max_length)
        return [
            open_split(
                build(TASKS, named), named.name, "test", measure=measure, limit=self._questions, screen=self._screen
            )
            for named in (self._spec.task, *self._spec.evaluate)
        ]
