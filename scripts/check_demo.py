"""Check what a finished demo must show: a poor floor, and at least three of the four methods well above it.

python scripts/check_demo.py runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_mllm.study.analyse import analyse
from peft_mllm.study.outcomes import FULL, ZERO_SHOT
from peft_mllm.study.pages.write import PAGE
from peft_mllm.study.reading import read_study

POOR, WELL_ABOVE, ENOUGH, KNOWN, SEEDS = 40.0, 30.0, 3, 95.0, 3


def main(runs: Path) -> int:
    found = analyse(read_study(runs))
    lines = {line.factors["method"]: line for line in found.lines}
    scores = {method: line.score.value for method, line in lines.items() if line.score}
    floor, known = scores[ZERO_SHOT], lines[ZERO_SHOT].seen or 0.0
    tuned = [method for method in scores if method not in (ZERO_SHOT, FULL)]
    above = [method for method in tuned if scores[method] > floor + WELL_ABOVE]
    print(f"zero-shot {floor:.1f} on the new task, {known:.1f} on what it knew; well above: {', '.join(above)}")
    whole = not found.missing and not found.failed and all(lines[method].seeds == SEEDS for method in [*tuned, FULL])
    page = runs / "report" / PAGE
    good = whole and floor < POOR and len(above) >= ENOUGH and known >= KNOWN and page.stat().st_size > 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
