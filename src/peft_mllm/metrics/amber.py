"""AMBER's discriminative part: questions of yes or no about what is there, its attributes, and relations.

Wang et al. 2023 (arXiv 2311.07397); source: junyangwang0410/AMBER inference.py. An answer counts only if it is
exactly "Yes" or "No". *No*, the answer that finds a hallucination, is the positive class:

    accuracy  = right / all             precision = No to no / all No           recall = No to no / all no
    f1 = 2 P R / (P + R + 0.0001)       (0.001 for existence), with P and R as printed, to 0.1 per cent

The generative part needs a tagger and word vectors, and is not computed; its answers are left aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant, per_cent, reference
from peft_mllm.metrics.reading import Row, one_file, read
from peft_mllm.record import Record

_PREFIX = "discriminative-"
DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "existence": ("hallucination",),
    "attribute": ("attribute-state", "attribute-number", "attribute-action"),
    "state": ("attribute-state",),
    "number": ("attribute-number",),
    "action": ("attribute-action",),
    "relation": ("relation",),
}
"""The kinds of question, as the annotations call them without "discriminative-", that make a dimension."""


class AMBER(Metric):
    """Accuracy, precision, recall and F1 of finding hallucinations, in all and by dimension."""

    source = "junyangwang0410/AMBER inference.py"
    variants = {
        "official": Variant(
            "amber/official: exactly 'Yes' or 'No', all else is wrong; no is the positive class",
            "accuracy; precision, recall and F1 of 'No', F1 from P and R rounded to 0.1 per cent",
        ),
        "forgiving": Variant(
            "amber/forgiving: yes or no after strip, lower and without a full stop; no is the positive class",
            "as official, on 'Yes' or 'No' read from lower(strip(answer, ' .'))",
            "'No.' and 'no' are 'No': the same for models that answer as asked",
        ),
    }
    files = "annotations.json [{id, type, truth}] and answers [{id, response}]"

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each answer; a record's answer is yes or no, its kind `meta["kind"]`."""
        read_one = _forgiving if self.variant == "forgiving" else _official
        parsed = [read_one(prediction) for prediction in predictions]
        truths = [record.answer for record in records]
        right = [float(given == truth) for given, truth in zip(parsed, truths, strict=True)]
        pairs = list(zip(parsed, truths, [record.meta.get("kind", "") for record in records], strict=True))
        values = {"accuracy": per_cent(right), **_of_no(pairs, 0.0001, "")}
        for name, kinds in DIMENSIONS.items():
            mine = [pair for pair in pairs if pair[2] in kinds]
            if mine:
                values[f"accuracy/{name}"] = per_cent(float(given == truth) for given, truth, _ in mine)
                values |= _of_no(mine, 0.001 if name == "existence" else 0.0001, f"/{name}")
        return Scores(values, right, parsed)

    def read(self, given: Given) -> Case:
        """Read annotations and answers; of both, the discriminative part."""
        rows = [row for path in given.references for row in read(path).rows("annotations")]
        generative = {row.key(("id",)) for row in rows if not _kind(row).startswith(_PREFIX)}
        answers = read(one_file(given.predictions, "--predictions")).rows("predictions", "results")
        predictions = [
            Prediction(row.key(("id",)), row.text(("response", "answer", "text")), row.place) for row in answers
        ]
        predictions = [prediction for prediction in predictions if prediction.key not in generative]
        records = [_record(row) for row in rows if _kind(row).startswith(_PREFIX)]
        if not records:
            raise DataError(f"{given.references[0]}: has no question whose type begins with '{_PREFIX}'.")
        return Case(predictions, _of_dimensions(records, predictions))


def _of_dimensions(records: Sequence[Record], predictions: Sequence[Prediction]) -> list[Record]:
    """The questions of the dimensions that were answered: the release has a query file for each."""
    kinds = {record.id: record.meta["dimension"] for record in records}
    answered = {kinds[each.key] for each in predictions if each.key in kinds}
    return [record for record in records if record.meta["dimension"] in answered or not answered]


def _official(text: str) -> str | None:
    return {"Yes": "yes", "No": "no"}.get(text)


def _forgiving(text: str) -> str | None:
    plain = text.strip(" .\n\t").lower()
    return plain if plain in ("yes", "no") else None


def _kind(row: Row) -> str:
    return row.text(["type"], "type")


def _record(row: Row) -> Record:
    truth = row.text(["truth"], "truth").lower()
    if truth not in ("yes", "no"):
        row.fail(f"the truth is {truth!r}, and must be yes or no.")
    kind = _kind(row).removeprefix(_PREFIX)
    return reference(row.key(("id",)), truth, source=row.place, kind=kind, dimension=kind.split("-")[0])


def _of_no(pairs: Sequence[tuple[str | None, str, str]], epsilon: float, suffix: str) -> dict[str, float]:
    said = [truth for given, truth, _ in pairs if given == "no"]
    there = [given for given, truth, _ in pairs if truth == "no"]
    precision = 100 * said.count("no") / len(said) if said else 0.0
    recall = 100 * there.count("no") / len(there) if there else 0.0
    p, r = round(precision, 1) / 100, round(recall, 1) / 100
    f1 = 100 * 2 * p * r / (p + r + epsilon)
    return {f"precision{suffix}": precision, f"recall{suffix}": recall, f"f1{suffix}": f1}
