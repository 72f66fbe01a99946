"""SHELF of metrics: one file per metric."""

from peft_mllm.metrics.base import Metric, Scores
from peft_mllm.shelf import Item, Shelf

METRICS: Shelf[Metric] = Shelf("metric", package=__name__, items={
    "scienceqa": Item("scienceqa:ScienceQAAccuracy", "the right option's letter, read as LLaVA does"),
    "iconqa": Item("iconqa:IconQAAccuracy", "the right text after strip and lower, by grade and skill"),
    "exact": Item("exact:Exact", "the reference's text, apart from case and surrounding space"),
})  # fmt: skip

__all__ = ["METRICS", "Item", "Metric", "Scores"]
