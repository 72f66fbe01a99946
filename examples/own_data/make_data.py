"""Write a small data set of pictures with questions: traffic lights, one lamp lit.

    python examples/own_data/make_data.py runs/lights

It stands for your own data: a folder of images, and for each split a JSONL file with one record on a line.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

LAMPS = {"red": (214, 40, 40), "yellow": (245, 205, 40), "green": (40, 160, 70)}
PICTURES = {"train": 120, "validation": 16, "test": 32}


def main(folder: Path) -> None:
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, pictures in PICTURES.items():
        records = []
        for number in range(pictures):
            lit = rng.choice(list(LAMPS))
            name = f"images/{split}-{number}.png"
            draw(lit, rng).save(folder / name)
            records += [record(name, question, answer) for question, answer in questions(lit)]
        lines = "".join(json.dumps(each) + "\n" for each in records)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(records)} questions about {pictures} pictures")


def questions(lit: str) -> list[tuple[str, str]]:
    return [("Which lamp is lit?", lit), ("May I go?", "yes" if lit == "green" else "no")]


def record(image: str, question: str, answer: str) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": f"<image>\n{question}"},
            {"role": "assistant", "content": answer},
        ],
        "images": [image],
    }


def draw(lit: str, rng: random.Random) -> Image.Image:
    """A traffic light of 96 x 96 pixels, a little brighter or darker and a little off its place each time."""
    grey = rng.randint(20, 90)
    picture = Image.new("RGB", (96, 96), (grey, grey, grey))
    pen = ImageDraw.Draw(picture)
    for place, (lamp, colour) in enumerate(LAMPS.items()):
        x, y = 48 + rng.randint(-3, 3), 16 + 32 * place + rng.randint(-3, 3)
        r = rng.randint(9, 12)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour if lamp == lit else (10, 10, 10))
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"Say where to: python {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]))
