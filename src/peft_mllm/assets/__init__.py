"""Files shipped with the package."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
"""The embedded base: a small LLaVA, really trained, that plain transformers loads."""

MATRIX = Path(__file__).parent / "matrix.json"
"""What every method does on every tiny family, as `peft-mllm matrix` found it."""

PLAIN_TEXT = Path(__file__).parent / "plain_text.txt"
"""A short English text of our own, in paragraphs, to see what a model has forgotten of plain language."""
