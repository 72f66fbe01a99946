"""Write a small table of results: three methods and the model as it is, three seeds, 200 items of two tasks.

    python examples/import_results/make_results.py runs/results.csv

It stands for results of any other trainer: one line is what one run scored on one item.
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

ABILITY = {"zero-shot": -0.6, "lora": 0.7, "adapter": 0.6, "ia3": 0.0}
TRAINABLE = {"zero-shot": 0, "lora": 319_815_680, "adapter": 201_326_592, "ia3": 614_400}
"""Made up, like the scores; of a model with 7 billion parameters."""
ITEMS = 200


def main(file: Path) -> None:
    rng = random.Random(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as table:
        lines = csv.writer(table)
        lines.writerow(["model", "method", "task", "seed", "item", "score", "trainable"])
        for task in ("charts", "receipts"):
            hard = [rng.gauss(0, 1) for _ in range(ITEMS)]
            for method, ability in ABILITY.items():
                for seed in [""] if method == "zero-shot" else [1, 2, 3]:
                    able = ability + (0 if method == "zero-shot" else rng.gauss(0, 0.08))
                    for item in range(ITEMS):
                        right = int(able - hard[item] + rng.gauss(0, 0.4) > 0)
                        lines.writerow(["my-model", method, task, seed, f"{task}-{item}", right, TRAINABLE[method]])
    print(f"{file}: {2 * 10 * ITEMS} lines")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"Say where to: python {sys.argv[0]} FILE.csv")
    main(Path(sys.argv[1]))
