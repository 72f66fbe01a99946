"""Captions: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L, and on request METEOR and SPICE.

Chen et al. 2015 (arXiv 1504.00325); source: tylin/coco-caption, pycocoevalcap. References and captions are
tokenised as Stanford's PTBTokenizer does (`text/ptb.py`), lose their punctuation, and are compared:

    CIDEr = 10 * mean over images, references and n = 1..4 of cos(min(g(c), g(r)), g(r)) * exp(-(l_c - l_r)^2 / 72)
    BLEU-n = min(1, exp(1 - r/c)) * (product over k <= n of p_k)^(1/n)
    ROUGE-L = (1 + b^2) P R / (R + b^2 P), b = 1.2, P and R of the longest common subsequence

with g the tf-idf weights of n-grams. The official figures lie between 0 and 1 (CIDEr up to 10); papers print them
times 100. METEOR and SPICE are Java programs, run through pycocoevalcap where both are there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
from collections.abc import Sequence
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Case, Given, Metric, Scores, Variant, reference
from peft_mllm.metrics.reading import Document, Row, in_words, one_file, prediction_of, read
from peft_mllm.metrics.splits import asked_ids
from peft_mllm.record import Record

_IDS = ("image_id", "id", "question_id", "image")
_TOKENS = "PTB tokens without punctuation"
_FIGURES = "CIDEr-D, BLEU-1..4 with the closest reference length, ROUGE-L with beta 1.2"


class Caption(Metric):
    """CIDEr-D, the headline, with BLEU and ROUGE-L, of the corpus; of each image among the details."""

    source = "tylin/coco-caption (pycocoevalcap 1.2)"
    unit = "0-1"
    variants = {
        "official": Variant(f"caption/official: {_TOKENS}; {_FIGURES}", f"{_FIGURES} on {_TOKENS}"),
        "meteor": Variant(
            f"caption/meteor: as official, and METEOR 1.5 by its Java program; {_TOKENS}",
            f"{_FIGURES} on {_TOKENS}; METEOR -l en -norm",
            "adds METEOR; needs Java and the extra 'java'",
        ),
        "spice": Variant(
            f"caption/spice: as official, METEOR 1.5 and SPICE by their Java programs; {_TOKENS}",
            f"{_FIGURES} on {_TOKENS}; METEOR -l en -norm; F of scene graph tuples",
            "adds METEOR and SPICE; needs Java and the extra 'java', which fetches 384 MB of models for SPICE",
        ),
        "untokenised": Variant(
            f"caption/untokenised: texts split at spaces, as they are; {_FIGURES}",
            f"{_FIGURES} on split(text)",
            "VLMEvalKit's COCO scorer: a full stop or a capital is another word, so figures are lower",
        ),
    }
    files = "COCO caption files: references {images, annotations: [{image_id, caption}]}, results [{image_id, caption}]"

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each caption against its record's `meta["references"]`, or its answer where there is one."""
        from peft_mllm.metrics.text.ngrams import bleu, cider_d, rouge_l

        if not records:
            raise DataError("There are no records to score. Give a split that has some.")
        references = [tuple(record.meta.get("references") or (record.answer,)) for record in records]
        captions, tokens = self._tokens(list(predictions), references)
        figures = {"CIDEr": cider_d(captions, tokens)}
        figures |= {f"Bleu_{n}": scores for n, scores in enumerate(bleu(captions, tokens), start=1)}
        figures["ROUGE_L"] = rouge_l(captions, tokens)
        values = {name: scores.corpus for name, scores in figures.items()}
        details = [{name: scores.each[i] for name, scores in figures.items()} for i in range(len(records))]
        for name in {"meteor": ("METEOR",), "spice": ("METEOR", "SPICE")}.get(self.variant, ()):
            values[name], each = _by_java(name, captions, tokens)
            details = [{**detail, name: score} for detail, score in zip(details, each, strict=True)]
        return Scores(values, figures["CIDEr"].each, captions, details)

    def read(self, given: Given) -> Case:
        """Read COCO references and results; exactly one caption for each image."""
        records = [record for path in given.references for record in _references(read(path))]
        if given.questions:
            asked = asked_ids(given.questions)
            records = [record for record in records if record.id in asked]
        rows = read(one_file(given.predictions, "--predictions")).rows("annotations", "predictions", "results")
        return Case([prediction_of(row, keys=_IDS) for row in rows], records)

    def _tokens(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[list[str], list[list[str]]]:
        if self.variant == "untokenised":
            return list(predictions), [list(refs) for refs in references]
        from peft_mllm.metrics.text.ptb import tokenise

        together = iter(tokenise([ref for refs in references for ref in refs]))
        return tokenise(predictions), [[next(together) for _ in refs] for refs in references]


def _references(document: Document) -> list[Record]:
    """One record for each image, with its captions in the order of the file."""
    captions: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for row in document.rows("annotations"):
        key = row.key(_IDS[:1] if "image_id" in row.value else _IDS)
        places.setdefault(key, row.place)
        captions.setdefault(key, []).extend(_captions(row))
    if document.has("images", list):
        images = [row.key(("id",)) for row in Document(document.path, document.value["images"]).rows()]
        without = [key for key in images if key not in captions]
        if without:
            raise DataError(f"{document.path}: {len(without)} images have no caption: {', '.join(without[:10])}.")
        # the official order: a caption's tokens depend on how the next one begins
        captions = {key: captions[key] for key in dict.fromkeys([*images, *captions])}
    return [reference(key, texts[0], source=places[key], references=tuple(texts)) for key, texts in captions.items()]


def _captions(row: Row) -> list[str]:
    found = row.find(("caption", "captions", "references", "answer"), "caption")
    texts = found if isinstance(found, list) else [found]
    if not texts:
        row.fail("the list of captions is empty.")
    for text in texts:
        if not isinstance(text, str):
            row.fail(f"the caption is {text!r}, {in_words(text)}, and must be text.")
    return texts


def _by_java(name: str, captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR or SPICE, by pycocoevalcap's own wrapper of the Java program."""
    if shutil.which("java") is None:
        raise DataError(f"{name} is a Java program, and there is no 'java' here. Install a Java runtime (8 or newer).")
    try:
        module = importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}")
    except ImportError as error:
        raise DataError(f"{name} needs pycocoevalcap: pip install 'peft-mllm[java]'.") from error
    scorer: Any = getattr(module, name.capitalize())
    given = {i: [caption] for i, caption in enumerate(captions)}
    expected = {i: list(refs) for i, refs in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):
        corpus, each = scorer().compute_score(expected, given)
    return float(corpus), [float(score["All"]["f"]) if isinstance(score, dict) else float(score) for score in each]
