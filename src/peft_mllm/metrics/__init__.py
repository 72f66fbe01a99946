"""SHELF of metrics: one file per metric. To add one, see docs/add-a-metric.md.

A task names a metric by a string, with a variant after a colon where it wants another than the first: `vqa`,
`vqa:vizwiz`.
"""

from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant
from peft_mllm.shelf import Item, Shelf, UnknownNameError, did_you_mean

METRICS: Shelf[Metric] = Shelf("metric", package=__name__, items={
    "vqa": Item("vqa:VQAAccuracy", "agreement with ten people's answers: VQAv2, OK-VQA, TextVQA, VizWiz"),
    "scienceqa": Item("scienceqa:ScienceQAAccuracy", "the right option's letter, by subject, context and grade"),
    "iconqa": Item("iconqa:IconQAAccuracy", "the right choice or string, by sub-task, grade and skill"),
    "ocrvqa": Item("ocrvqa:OCRVQAAccuracy", "the reference's text, or a text that contains it"),
    "gqa": Item("gqa:GQAAccuracy", "the reference's word, by kind of question"),
    "exact": Item("exact:Exact", "the reference's text, apart from case and surrounding space"),
    "listed": Item("listed:Listed", "a list of named things: F1, and what is named but not there (hallucination)"),
    "caption": Item("caption:Caption", "CIDEr-D, BLEU and ROUGE-L of captions, as the COCO scorer has them"),
    "pope": Item("pope:POPE", "is an object there: yes or no, by set of questions"),
    "chair": Item("chair:CHAIR", "objects that a caption names and the image does not show"),
    "amber": Item("amber:AMBER", "AMBER's questions of yes or no: existence, attributes, relations"),
    "mmhal": Item("mmhal:MMHal", "MMHal-Bench: answers rated by a judge model of yours"),
})  # fmt: skip

__all__ = ["METRICS", "Case", "Given", "Item", "Metric", "Prediction", "Scores", "Variant", "metric_named", "no_metric"]


def metric_named(name: str) -> Metric:
    """The metric that a string stands for: `name`, or `name:variant`.

    Raises:
        UnknownNameError: there is no such metric or variant; names the nearest.
    """
    problem = no_metric(name)
    if problem:
        raise UnknownNameError(problem)
    metric, _, variant = name.partition(":")
    return METRICS[metric](variant or None)


def no_metric(name: str) -> str | None:
    """Why a string stands for no metric, in a sentence; None if it does."""
    metric, colon, variant = name.partition(":")
    if metric not in METRICS:
        return f"There is no metric '{metric}'. {did_you_mean(metric, list(METRICS))}"
    known = list(METRICS[metric].variants)
    if colon and variant not in known:
        return f"The metric '{metric}' has no variant '{variant}'. {did_you_mean(variant, known)}"
    return None
