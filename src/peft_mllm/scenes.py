"""A world small enough to be learned on a CPU: coloured shapes in the cells of a 3 x 3 grid.

The embedded base is trained on these scenes and the tasks `scenes_*` ask about them. Everything here is a
pure function of its arguments: no file, no state, the same scene and the same pixels in every process.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peft_mllm.record import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (50, 90, 220),
    "yellow": (245, 205, 40),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}
FORMS = ("circle", "square", "triangle", "cross")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
CELL = 32
"""Side of a grid cell in pixels; the embedded base sees the picture at half this size, one patch a cell."""
SIDE = 3 * CELL
MOST_SHAPES = 5

Split = Literal["train", "validation", "test"]


def seeded(key: str) -> random.Random:
    """A random generator that depends on the key alone (`hash()` differs between processes)."""
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


@dataclass(frozen=True, order=True)
class Shape:
    """One coloured shape in one cell; sorts in reading order."""

    row: int
    column: int
    colour: str
    form: str

    @property
    def name(self) -> str:
        """Colour and form: `red circle`."""
        return f"{self.colour} {self.form}"

    @property
    def place(self) -> str:
        """The cell in words: `top left`."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order, at most one in a cell."""

    shapes: tuple[Shape, ...]

    @property
    def key(self) -> str:
        """The content as text; equal keys mean equal pixels."""
        return ",".join(f"{s.row}{s.column}{s.colour}-{s.form}" for s in self.shapes)

    @property
    def split(self) -> Split:
        """The one split this content belongs to, so that no held-out scene was ever trained on."""
        tenth = hashlib.sha256(self.key.encode()).digest()[0] % 10
        return "validation" if tenth == 0 else "test" if tenth == 1 else "train"

    def at(self, row: int, column: int) -> str:
        """What is in a cell: `red circle` or `nothing`."""
        return next((s.name for s in self.shapes if (s.row, s.column) == (row, column)), "nothing")

    def draw(self) -> Image:
        """Paint the scene, `SIDE` x `SIDE` RGB; shades, sizes and offsets follow from the key."""
        from PIL import Image, ImageDraw

        rng = seeded(f"pixels {self.key}")
        grey = rng.randint(20, 90)
        image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            x = shape.column * CELL + CELL // 2 + rng.randint(-3, 3)
            y = shape.row * CELL + CELL // 2 + rng.randint(-3, 3)
            r = rng.randint(9, 12)
            shade = rng.uniform(0.8, 1.0)
            fill = tuple(round(shade * channel) for channel in COLOURS[shape.colour])
            if shape.form == "circle":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            elif shape.form == "square":
                pen.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=fill)
            elif shape.form == "triangle":
                pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=fill)
            else:
                pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=fill)
                pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=fill)
        return image


@dataclass(frozen=True)
class SceneImage(ImageSource):
    """A scene as an image that is painted when it is needed."""

    scene: Scene

    @property
    def key(self) -> str:
        """Equal keys mean equal pixels."""
        return f"scene:{self.scene.key}"

    def load(self) -> Image:
        """Paint it."""
        return self.scene.draw()


def _candidates(rng: random.Random) -> Iterator[Scene]:
    while True:
        # Few colours and forms to a scene, so that shapes of a scene are alike and easily confused.
        colours = rng.sample(list(COLOURS), rng.randint(2, 5))
        forms = rng.sample(FORMS, rng.randint(2, 4))
        cells = sorted(rng.sample(range(9), rng.randint(2, MOST_SHAPES)))
        yield Scene(tuple(Shape(c // 3, c % 3, rng.choice(colours), rng.choice(forms)) for c in cells))


def make_scene(seed: int | str, split: Split | None = None) -> Scene:
    """Make the scene of a seed; with a split, the seed's first scene that belongs to it."""
    scenes = _candidates(seeded(f"scene {seed}"))
    return next(scene for scene in scenes if split is None or scene.split == split)
