"""Run directories as the trainer writes them, with made-up figures; shared by the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

TASK = "scenes_position"
SEEN = ("scenes_colour", "scenes_count")


def write_run(
    folder: Path,
    name: str,
    *,
    method: str | None = None,
    location: str | None = "both",
    parameters: int = 9000,
    accuracy: float = 90.0,
    seen: float = 95.0,
    n: int = 200,
    seconds: float = 21.0,
    seed: int = 42,
    answer: str = "red",
    **changes: object,
) -> Path:
    """Write one run directory and return it; without parameters it is a zero-shot run."""
    directory = folder / f"{name.encode('ascii', 'ignore').decode().replace('/', '_')}-{seed}"
    (directory / "predictions").mkdir(parents=True)
    means = {TASK: accuracy} | {task: seen + i for i, task in enumerate(SEEN)}
    scores = {task: _score(directory, name, task, mean, n, answer) for task, mean in means.items()}
    result = {
        "schema": 1,
        "name": name,
        "spec": {"method": {"name": method or name}, "train": {"num_train_epochs": 3}},
        "spec_id": "0123456789abcdef",
        "method": {
            "name": method or name,
            "location": location if parameters else None,
            "options": {"rank": 8},
        },
        "model": {"source": "embedded", "family": "llava", "parameters": 1_400_000, "fingerprint": "f00d"},
        "trainable": {"llm": {"parameters": parameters, "learning_rate": 2e-4}} if parameters else {},
        "data": {"train": {"task": TASK, "read": 2000, "used": 1998, "quarantined": 2, "fingerprint": "d474"}},
        "training": _training(seconds) if parameters else None,
        "scores": scores,
        "peak_memory_bytes": 812_000_000,
        "adapter": {"directory": "adapter", "bytes": parameters * 4} if parameters else None,
        "environment": {"python": "3.11.9", "torch": "2.13.0", "peft": "0.21.2"},
        "seed": seed,
        "notes": [],
    }
    (directory / "result.json").write_text(json.dumps(result | changes))
    if parameters:
        _write_metrics(directory / "metrics.jsonl", accuracy, seconds)
    return directory


def _training(seconds: float) -> dict[str, object]:
    return {
        "steps": 150,
        "epochs": 3.0,
        "seconds": seconds,
        "tokens": 120_000,
        "answer_tokens": 9_000,
        "tokens_per_second": 5700.0,
        "best": {"step": 100, "eval_loss": 0.1},
    }


def _score(directory: Path, name: str, task: str, mean: float, n: int, answer: str) -> dict[str, object]:
    right = round(mean / 100 * n)
    # The same questions are the hard ones for every run, up to a few: so it is with real runs.
    drawn = random.Random(f"{name}{task}")
    hardness = [(i * 37 % n + drawn.uniform(0, n / 4), i) for i in range(n)]
    solved = {i for _, i in sorted(hardness)[:right]}
    lines = [_line(i, i in solved, answer) for i in range(n)]
    file = f"predictions/{task}.jsonl"
    (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "split": "test",
        "metric": "exact",
        "rule": "exact/strip-lower",
        "n": n,
        "unparsed": sum(line["parsed"] is None for line in lines),
        "values": {"accuracy": 100 * right / n},
        "seconds": 2.1,
        "predictions": file,
    }


def _line(i: int, right: bool, answer: str) -> dict[str, object]:
    said = answer if right else ("blue" if i % 3 else "I cannot see that in the picture")
    return {
        "id": f"test-{i}",
        "prediction": said,
        "answer": answer,
        "score": float(right),
        "parsed": said if right or i % 3 else None,
    }


def _write_metrics(file: Path, accuracy: float, seconds: float) -> None:
    noise = random.Random(accuracy)
    floor = (101 - accuracy) / 60
    lines = []
    for step in range(1, 151):
        loss = floor + 2.2 * math.exp(-step / 30) + noise.uniform(-0.08, 0.08)
        lines.append({"step": step, "epoch": step / 50, "loss": max(loss, 0.01), "seconds": seconds * step / 150})
        if step % 50 == 0:
            lines.append({"step": step, "eval_loss": floor + 2.2 * math.exp(-step / 30) + 0.05})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_study(folder: Path) -> list[Path]:
    """A zero-shot run and five methods; ia3 is cheap, full forgets."""
    return [
        write_run(folder, "zero-shot", method="none", parameters=0, accuracy=31.5, seen=96.5),
        write_run(folder, "full", parameters=1_100_000, accuracy=94.5, seen=81.0, seconds=38.5),
        write_run(folder, "adapter", location="mlp", parameters=24_600, accuracy=92.5, seen=93.0, seconds=24.0),
        write_run(folder, "lora", parameters=36_900, accuracy=95.0, seen=92.0, seconds=21.3),
        write_run(folder, "ia3", parameters=1_150, accuracy=78.0, seen=96.0, seconds=18.2),
        write_run(folder, "prefix", location=None, parameters=5_120, accuracy=61.0, seen=95.0, seconds=19.8),
    ]
