"""Questions about generated scenes: what the embedded base was trained on, and what it never saw.

A question kind is one class here: `ask` draws one question and its answer about a scene. The base saw the
kinds in `SEEN` (on scenes of the train split); those in `UNSEEN` serve as new tasks to adapt to.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, overload

from pydantic import Field

from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.scenes import COLOURS, COLUMNS, FORMS, ROWS, Scene, SceneImage, make_scene, seeded
from peft_mllm.tasks.base import Split, Task, TaskOptions

SEEN = (
    "scenes_caption",
    "scenes_at",
    "scenes_where",
    "scenes_count",
    "scenes_exists",
    "scenes_colour",
)
UNSEEN = (
    "scenes_blank",
    "scenes_missing",
    "scenes_row",
    "scenes_choose",
    "scenes_next",
    "scenes_relative",
    "scenes_compare",
)


class ScenesOptions(TaskOptions):
    """How many questions, about which scenes."""

    size: dict[Split, int] = Field(default={"train": 2048, "validation": 256, "test": 320})
    """Questions in each split."""
    questions_per_image: int = Field(default=4, ge=1)
    """Neighbouring questions about one scene; a kind with fewer to ask about a scene asks those."""
    seed: int = 0
    """Other seeds give other scenes of the same splits."""


class _Questions(Sequence[Record]):
    """The questions of one task and split, made when indexed."""

    def __init__(self, task: SceneTask, split: Split):
        self._task = task
        self._split = split

    def __len__(self) -> int:
        return self._task.options.size.get(self._split, 0)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._task.record(self._split, i)


class SceneTask(Task):
    """What all question kinds share; a kind adds `ask`."""

    Options = ScenesOptions
    metric = "exact"
    seen: ClassVar[bool]
    """Whether the embedded base was trained on this kind of question."""
    most_per_image: ClassVar[int] = 64
    """How many questions this kind has about one scene, at most."""
    options: ScenesOptions

    def __init__(self, options: TaskOptions | None = None):
        self.options = ScenesOptions.model_validate((options or ScenesOptions()).model_dump())

    @abstractmethod
    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Draw one question and its answer; None where the scene allows no question of this kind."""

    def records(self, split: Split) -> Sequence[Record]:
        """The questions of a split, each a pure function of task, split, seed and place."""
        return _Questions(self, split)

    def record(self, split: Split, index: int) -> Record:
        """The question at one place of a split."""
        group = min(self.options.questions_per_image, self.most_per_image)
        key = f"{type(self).__name__} {split} {self.options.seed} {index // group}"
        scene, drawn = self._group(key, split, group)
        question, answer = drawn[index % group]
        return Record(
            id=f"{split}-{self.options.seed}-{index}",
            turns=(Turn("user", f"{IMAGE_MARK}\n{question}"), Turn("assistant", answer)),
            images=(SceneImage(scene),),
            source=f"{split}:{index}",
        )

    def _group(self, key: str, split: Split, size: int) -> tuple[Scene, list[tuple[str, str]]]:
        """A scene and `size` questions about it; distinct ones, where the scene has as many."""
        attempt = 0
        while True:
            scene = make_scene(f"{key} {attempt}", split)
            rng = seeded(f"questions {key} {attempt}")
            draws = [pair for _ in range(4 * size) if (pair := self.ask(scene, rng)) is not None]
            if draws:
                distinct = list(dict.fromkeys(draws))
                return scene, [distinct[i % len(distinct)] for i in range(size)]
            attempt += 1


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _near_miss(scene: Scene, rng: random.Random) -> str:
    """A shape that is not there, of a colour and a form that are, if there is one; else of any."""
    names = {s.name for s in scene.shapes}
    colours = sorted({s.colour for s in scene.shapes})
    forms = sorted({s.form for s in scene.shapes})
    near = [name for c in colours for f in forms if (name := f"{c} {f}") not in names]
    if near and rng.random() < 0.7:
        return rng.choice(near)
    return rng.choice([name for c in COLOURS for f in FORMS if (name := f"{c} {f}") not in names])


def _cell(scene: Scene, rng: random.Random) -> tuple[int, int]:
    """An occupied cell three times in four, so that `nothing` is not the usual answer."""
    if rng.random() < 0.75:
        shape = rng.choice(scene.shapes)
        return shape.row, shape.column
    return rng.randrange(3), rng.randrange(3)


class Caption(SceneTask):
    """List all shapes in reading order."""

    seen = True
    max_new_tokens = 24
    most_per_image = 1

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `List the shapes.`, answered `red circle, blue cross`."""
        return "List the shapes.", ", ".join(s.name for s in scene.shapes)


class At(SceneTask):
    """Name what is in a cell."""

    seen = True

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What is at the top left?`, answered `red circle` or `nothing`."""
        row, column = _cell(scene, rng)
        return f"What is at the {ROWS[row]} {COLUMNS[column]}?", scene.at(row, column)


class Where(SceneTask):
    """Tell the cell of a shape that occurs once."""

    seen = True

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Where is the red circle?`, answered `top left`."""
        if not (single := scene.only("name")):
            return None
        shape = rng.choice(single)
        return f"Where is the {shape.name}?", shape.place


class Count(SceneTask):
    """Count all shapes, or those of one colour or form."""

    seen = True

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `How many red shapes are there?`, answered `2`."""
        what = rng.choice(("all", "colour", "colour", "form", "form"))
        if what == "all":
            return "How many shapes are there?", str(len(scene.shapes))
        present = rng.choice(scene.shapes)
        if what == "colour":
            colour = present.colour if rng.random() < 0.85 else rng.choice(list(COLOURS))
            count = sum(s.colour == colour for s in scene.shapes)
            return f"How many {colour} shapes are there?", str(count)
        form = present.form if rng.random() < 0.85 else rng.choice(FORMS)
        plural = "crosses" if form == "cross" else f"{form}s"
        return f"How many {plural} are there?", str(sum(s.form == form for s in scene.shapes))


class Exists(SceneTask):
    """Say whether a shape is there."""

    seen = True

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Is there a red circle?`, answered `yes` or `no`."""
        there = rng.random() < 0.5
        name = rng.choice(scene.shapes).name if there else _near_miss(scene, rng)
        return f"Is there a {name}?", _yes(there)


class Colour(SceneTask):
    """Tell the colour of the only shape of a form."""

    seen = True
    most_per_image = 2

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What colour is the circle?`, answered `red`."""
        if not (single := scene.only("form")):
            return None
        shape = rng.choice(single)
        return f"What colour is the {shape.form}?", shape.colour


class Blank(SceneTask):
    """Complete a sentence about a cell with the form alone."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Fill in the blank: at the top left is a red ___.`, answered `circle`."""
        shape = rng.choice(scene.shapes)
        return f"Fill in the blank: at the {shape.place} is a {shape.colour} ___.", shape.form


class Missing(SceneTask):
    """Say whether a shape is absent: the seen question's answer, turned round."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Is the red circle missing?`, answered `yes` or `no`."""
        there = rng.random() < 0.5
        name = rng.choice(scene.shapes).name if there else _near_miss(scene, rng)
        return f"Is the {name} missing?", _yes(not there)


class Row(SceneTask):
    """List the shapes of one row."""

    seen = False
    most_per_image = 3

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `List the shapes of the top row.`, answered `red circle, blue cross` or `nothing`."""
        row = rng.randrange(3)
        names = [s.name for s in scene.shapes if s.row == row]
        return f"List the shapes of the {ROWS[row]} row.", ", ".join(names) or "nothing"


class Choose(SceneTask):
    """Choose the text that is true of a cell."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What is at the top left? A. red circle B. blue cross`, answered `A` or `B`."""
        shape = rng.choice(scene.shapes)
        others = [f"{c} {f}" for c in COLOURS for f in FORMS if f"{c} {f}" != shape.name]
        choices = [shape.name, rng.choice(others)]
        rng.shuffle(choices)
        question = f"What is at the {shape.place}? A. {choices[0]} B. {choices[1]}"
        return question, "AB"[choices.index(shape.name)]


class Next(SceneTask):
    """Name what is beside a shape."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What is right of the red circle?`, answered `blue cross` or `nothing`."""
        beside = {s.name: scene.at(s.row, s.column + 1) for s in scene.only("name") if s.column < 2}
        if all(other == "nothing" for other in beside.values()):
            return None
        name = rng.choice(list(beside))
        return f"What is right of the {name}?", beside[name]


class Relative(SceneTask):
    """Compare the places of two shapes."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Is the red circle left of the blue cross?`, answered `yes` or `no`."""
        single = scene.only("name")
        pairs = [(a, b) for a in single for b in single if a.column != b.column]
        if not pairs:
            return None
        a, b = rng.choice(pairs)
        return f"Is the {a.name} left of the {b.name}?", _yes(a.column < b.column)


class Compare(SceneTask):
    """Compare two counts."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Are there more circles than crosses?`, answered `yes` or `no`."""
        a, b = rng.sample(FORMS, 2)
        more, less = (sum(s.form == form for s in scene.shapes) for form in (a, b))
        if more == less:
            return None
        words = ["crosses" if form == "cross" else f"{form}s" for form in (a, b)]
        return f"Are there more {words[0]} than {words[1]}?", _yes(more > less)
