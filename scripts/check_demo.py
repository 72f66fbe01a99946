"""Check what a finished demo must show: a poor floor, and at least three of the four methods well above it.

python scripts/check_demo.py runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_mllm.demo import STUDIED, TASK
from peft_mllm.study.compare import Row, compare
from peft_mllm.study.results import read_results
from peft_mllm.tasks.scenes import SEEN

POOR, WELL_ABOVE, ENOUGH, KNOWN = 40.0, 30.0, 3, 95.0


def main(runs: Path) -> int:
    names = ["none", *STUDIED, "full"]
    rows = dict(
        zip(names, compare(read_results([runs / TASK / n for n in names]), task=TASK, seen=SEEN).rows, strict=True)
    )
    floor = score(rows["none"])
    above = [name for name in STUDIED if score(rows[name]) > floor + WELL_ABOVE]
    known = rows["none"].seen or 0.0
    print(f"zero-shot {floor:.1f} on {TASK}, {known:.1f} on what it knew; well above the floor: {', '.join(above)}")
    page = runs / f"{TASK}.html"
    good = floor < POOR and len(above) >= ENOUGH and known >= KNOWN and page.stat().st_size > 0
    return 0 if good else 1


def score(row: Row) -> float:
    assert row.score is not None, f"{row.run} has no score"
    return row.score.value


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
