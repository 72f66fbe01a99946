"""Files shipped with the package."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
"""The embedded base: a small LLaVA, really trained, that plain transformers loads."""

EVIDENCE = Path(__file__).parent / "evidence"
"""What studies found, for `peft-mllm advise`; `scripts/update_evidence.py` makes the files."""

MATRIX = Path(__file__).parent / "matrix.json"
"""What every method does on every tiny family, as `peft-mllm matrix` found it."""

PAPER = Path(__file__).parent / "paper.json"
"""The study's tables and claims (Zhou et al. 2024), as they are printed."""

PLAIN_TEXT = Path(__file__).parent / "plain_text.txt"
"""A short English text of our own, in paragraphs, to see what a model has forgotten of plain language."""

QUICK = Path(__file__).parent / "quick.yaml"
"""The smallest study, which the demo runs; `studies/quick.yaml` leads here."""
