"""Questions about generated scenes: what the embedded base was trained on, and what it never saw.

A question kind is one class here: `ask` draws one question and its answer about a scene. The base saw the
kinds in `SEEN` (on scenes of the train split); those in `UNSEEN` serve as new tasks to adapt to. Those in
`MEASURES` ask a seen question again, on other scenes and scored by another rule.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, overload

from pydantic import AfterValidator, Field

from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.scenes import COLOURS, COLUMNS, FORMS, ROWS, Scene, SceneImage, make_scene, seeded
from peft_mllm.tasks.base import Split, Task, TaskOptions

SEEN = ("scenes_caption", "scenes_at", "scenes_colour", "scenes_exists", "scenes_count")
UNSEEN = (
    "scenes_shape",
    "scenes_nothing",
    "scenes_blank",
    "scenes_empty",
    "scenes_row",
    "scenes_column",
    "scenes_next",
    "scenes_choose",
    "scenes_compare",
)
MEASURES = ("scenes_describe",)
"""Kinds that ask what another kind asks, for another figure: no further kind that the base has or has not seen."""


def _count(number: int) -> int:
    if number < 0:
        raise ValueError(f"must be 0 or more, not {number}")
    return number


class ScenesOptions(TaskOptions):
    """How many questions, about which scenes."""

    size: dict[Split, Annotated[int, AfterValidator(_count)]] = Field(
        default={"train": 2048, "validation": 256, "test": 320}
    )
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
    meta: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What the metric needs beside the answer."""
    options: ScenesOptions

    def __init__(self, options: TaskOptions | None = None):
        self.options = ScenesOptions.model_validate((options or ScenesOptions()).model_dump())
        self._group = lru_cache(maxsize=4096)(self._make_group)  # a scene serves several questions, each read often

    @abstractmethod
    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Draw one question and its answer; None where the scene allows no question of this kind."""

    def has(self, split: Split) -> bool:
        """Whether questions of this split were asked for; of training, so that a run says there are none."""
        return split == "train" or self.options.size.get(split, 0) > 0

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
            meta=self.meta,
            source=f"{split}:{index}",
        )

    def _make_group(self, key: str, split: Split, size: int) -> tuple[Scene, list[tuple[str, str]]]:
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


def _place(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


def _cell(scene: Scene, rng: random.Random, *, filled: float) -> tuple[int, int]:
    """A cell that has a shape with probability `filled`, else one that has none."""
    taken = [(s.row, s.column) for s in scene.shapes]
    if rng.random() < filled:
        return rng.choice(taken)
    return rng.choice([(r, c) for r in range(3) for c in range(3) if (r, c) not in taken])


class Caption(SceneTask):
    """List all shapes in reading order."""

    seen = True
    max_new_tokens = 24
    most_per_image = 1

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `List the shapes.`, answered `red circle, blue cross`."""
        return "List the shapes.", ", ".join(s.name for s in scene.shapes)


class Describe(Caption):
    """The base's own captioning question, scored for what it names that is not there.

    Evaluated before and after tuning on another kind, it shows whether tuning made the model hallucinate. Its
    scenes are not those of `Caption`.
    """

    metric = "listed"
    meta = MappingProxyType({"things": frozenset(f"{colour} {form}" for colour in COLOURS for form in FORMS)})


class At(SceneTask):
    """Name what is in a cell."""

    seen = True

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What is at the top left?`, answered `red circle` or `nothing`."""
        row, column = _cell(scene, rng, filled=0.8)
        return f"What is at the {_place(row, column)}?", scene.at(row, column)


class Colour(SceneTask):
    """Tell the colour of the shape in a cell."""

    seen = True

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What colour is at the top left?`, answered `red`."""
        shape = rng.choice(scene.shapes)
        return f"What colour is at the {shape.place}?", shape.colour


class Exists(SceneTask):
    """Say whether a cell has a shape."""

    seen = True

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Is there a shape at the top left?`, answered `yes` or `no`."""
        row, column = _cell(scene, rng, filled=0.5)
        return f"Is there a shape at the {_place(row, column)}?", _yes(scene.at(row, column) != "nothing")


class Count(SceneTask):
    """Count the shapes, all or those of a row."""

    seen = True
    most_per_image = 4

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `How many shapes are in the top row?` or `... are there?`, answered `2`."""
        row = rng.randrange(4)
        if row == 3:
            return "How many shapes are there?", str(len(scene.shapes))
        return f"How many shapes are in the {ROWS[row]} row?", str(sum(s.row == row for s in scene.shapes))


class Shape(SceneTask):
    """Tell the form of the shape in a cell: a seen question with one word changed."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What shape is at the top left?`, answered `circle`."""
        shape = rng.choice(scene.shapes)
        return f"What shape is at the {shape.place}?", shape.form


class Nothing(SceneTask):
    """Say whether a cell has no shape: the answers of a seen question, turned round."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Is there nothing at the top left?`, answered `yes` or `no`."""
        row, column = _cell(scene, rng, filled=0.5)
        return f"Is there nothing at the {_place(row, column)}?", _yes(scene.at(row, column) == "nothing")


class Blank(SceneTask):
    """Complete a sentence about a cell with the form alone."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Fill in the blank: at the top left is a red ___.`, answered `circle`."""
        shape = rng.choice(scene.shapes)
        return f"Fill in the blank: at the {shape.place} is a {shape.colour} ___.", shape.form


class Empty(SceneTask):
    """Say whether a cell has no shape: the answer to a seen question, turned round."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Is the top left empty?`, answered `yes` or `no`."""
        row, column = _cell(scene, rng, filled=0.5)
        return f"Is the {_place(row, column)} empty?", _yes(scene.at(row, column) == "nothing")


class Row(SceneTask):
    """List the shapes of one row."""

    seen = False
    most_per_image = 3

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `List the shapes of the top row.`, answered `red circle, blue cross` or `nothing`."""
        row = rng.randrange(3)
        names = [s.name for s in scene.shapes if s.row == row]
        return f"List the shapes of the {ROWS[row]} row.", ", ".join(names) or "nothing"


class Column(SceneTask):
    """Count the shapes of one column."""

    seen = False
    most_per_image = 3

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `How many shapes are in the left column?`, answered `2`."""
        column = rng.randrange(3)
        count = sum(s.column == column for s in scene.shapes)
        return f"How many shapes are in the {COLUMNS[column]} column?", str(count)


class Next(SceneTask):
    """Name what is beside a cell."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What is right of the top left?`, answered `blue cross` or `nothing`."""
        row, column = _cell(scene, rng, filled=0.8)
        if column == 0:
            return None
        return f"What is right of the {_place(row, column - 1)}?", scene.at(row, column)


class Choose(SceneTask):
    """Choose the text that is true of a cell."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `What is at the top left? A. red circle B. blue cross`, answered `A` or `B`."""
        shape = rng.choice(scene.shapes)
        others = [f"{c} {f}" for c in COLOURS for f in FORMS if c != shape.colour]
        choices = [shape.name, rng.choice(others)]
        rng.shuffle(choices)
        question = f"What is at the {shape.place}? A. {choices[0]} B. {choices[1]}"
        return question, "AB"[choices.index(shape.name)]


class Compare(SceneTask):
    """Compare the counts of two rows."""

    seen = False

    def ask(self, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        """Ask `Are there more shapes in the top row than in the bottom row?`, answered `yes` or `no`."""
        a, b = rng.sample(range(3), 2)
        more, less = (sum(s.row == row for s in scene.shapes) for row in (a, b))
        if more == less:
            return None
        question = f"Are there more shapes in the {ROWS[a]} row than in the {ROWS[b]} row?"
        return question, _yes(more > less)
