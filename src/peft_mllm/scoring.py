"""Scoring files: the official predictions and references of anyone, by the metrics of the shelf.

The ids must be the same on both sides, once each: a score over what happens to be there is no score. Those who
want one all the same say so, and it is marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.metrics import Case, Given, Metric, Prediction, Scores
from peft_mllm.record import Record

SHOWN = 20
"""How many ids of one kind a message lists before it counts the rest."""


@dataclass(frozen=True)
class Scored:
    """What scoring files gave.

    Attributes:
        name: the metric's, on the shelf.
        metric: which was applied.
        scores: the figures.
        predictions: the answers scored, in the order of the records.
        records: what they were scored against.
        missing: ids of references without a prediction; only with `partial`.
        extra: ids of predictions without a reference; only with `partial`.
        unused: references that the rule does not ask answers for.
        dropped: further answers or questions without a reference, beside `extra`; only with `partial`.
    """

    name: str
    metric: Metric
    scores: Scores
    predictions: Sequence[Prediction]
    records: Sequence[Record]
    missing: Sequence[str]
    extra: Sequence[str]
    unused: int = 0
    dropped: int = 0

    @property
    def partial(self) -> bool:
        """Whether ids were left out."""
        return bool(self.missing or self.extra or self.dropped)

    def to_json(self) -> dict[str, Any]:
        """The figures, unrounded, with the name of the rule; and what was left out, where something was."""
        extra = len(self.extra) + self.dropped
        left_out = {"partial": True, "missing": len(self.missing), "extra": extra} if self.partial else {}
        return {
            "metric": self.name,
            "variant": self.metric.variant,
            "rule": self.metric.rule,
            "n": len(self.records),
            "unparsed": self.scores.unparsed,
            "scores": dict(self.scores.values),
            **left_out,
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """One object for each item: id, prediction, what was read from it, its score, and further figures."""
        parsed = self.scores.parsed or [prediction.text for prediction in self.predictions]
        details = self.scores.details or [{}] * len(self.records)
        for record, prediction, score, understood, more in zip(
            self.records, self.predictions, self.scores.per_question, parsed, details, strict=True
        ):
            yield {
                "id": record.id,
                "prediction": prediction.text,
                "answer": record.answer,
                "parsed": understood,
                "score": score,
                **more,
            }


def score_files(name: str, metric: Metric, given: Given) -> Scored:
    """Read official files, join predictions and references by id, and score.

    Args:
        name: the metric's, on the shelf.
        metric: the rule, with its variant.
        given: the files.

    Raises:
        DataError: a file is not what it must be, or the ids are not the same; names them.
    """
    case = metric.read(given)
    predictions, records, missing, extra = join(case, partial=given.partial)
    scores = metric.score([prediction.text for prediction in predictions], records)
    return Scored(name, metric, scores, predictions, records, missing, extra, case.unused, case.dropped)


def join(case: Case, *, partial: bool) -> tuple[list[Prediction], list[Record], list[str], list[str]]:
    """The predictions in the order of the records, the records that have one, and the ids that found no partner.

    Raises:
        DataError: an id stands twice; or is missing or extra, and that is not allowed.
    """
    _refuse_twice([record.id for record in case.records], "references", case.records[0].source if case.records else "")
    by_key = {prediction.key: prediction for prediction in case.predictions}
    known = {record.id for record in case.records}
    missing = [record.id for record in case.records if record.id not in by_key]
    extra = [key for key in by_key if key not in known]
    twice = [key for key, count in Counter(each.key for each in case.predictions).items() if count > 1]
    problems = [_listed(twice, "duplicate: more than one prediction for one id")] if twice else []
    if not partial:
        problems += (
            [_listed(missing, f"missing: no prediction for {len(missing)} of {len(known)} ids")] if missing else []
        )
        problems += [_listed(extra, "extra: a prediction without a reference")] if extra else []
    if problems:
        remedy = "" if partial or not (missing or extra) else "\nGive --partial to score the ids that both sides have."
        raise DataError("\n".join(["The ids of predictions and references differ.", *problems]) + remedy)
    records = [record for record in case.records if record.id in by_key]
    if not records:
        raise DataError("No prediction has the id of a reference: there is nothing to score. Are the files of one set?")
    return [by_key[record.id] for record in records], records, missing, extra


def _refuse_twice(keys: Sequence[str], what: str, place: str) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        where = place.rsplit(":", 1)[0].split(", entry")[0]
        raise DataError(f"{where}: {_listed(twice, f'duplicate ids among the {what}')}")


def _listed(keys: Sequence[str], what: str) -> str:
    rest = len(keys) - SHOWN
    return f"  {what} ({len(keys)}): {', '.join(keys[:SHOWN])}" + (f", and {rest} more" if rest > 0 else "")
