"""Files shipped with the package."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
"""The embedded base: a small LLaVA, really trained, that plain transformers loads."""
