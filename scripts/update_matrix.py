"""Makes the shipped capability matrix and its page from a finished `peft-mllm matrix`.

peft-mllm matrix --output runs/matrix
python scripts/update_matrix.py runs/matrix
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_mllm.assets import MATRIX
from peft_mllm.matrix.candidates import candidates
from peft_mllm.matrix.make import MATRIX as MADE
from peft_mllm.matrix.members import members
from peft_mllm.matrix.page import page
from peft_mllm.matrix.result import Matrix

PAGE = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ship a capability matrix.")
    parser.add_argument("directory", type=Path, help="what `peft-mllm matrix --output` was given")
    made = Matrix.read(parser.parse_args().directory / MADE)
    missing = [(n, m) for n in candidates() for m in members() if made.at(n, m) is None]
    if missing:
        raise SystemExit(f"{len(missing)} pairs were not tried, such as {missing[0]}: try all methods and models.")
    made.write(MATRIX)
    PAGE.write_text(page(made), encoding="utf-8")
    print(f"{MATRIX.name} and {PAGE.name}: {len(made.pairs)} pairs")


if __name__ == "__main__":
    main()
