"""What training kept and what it lost: losses on other tasks' answers and on plain text, before and after.

Of each subject, with l the cross-entropy of a token that is predicted from the true tokens before it:

    loss            = mean of l
    token_accuracy  = 100 * mean(the likeliest token is the true one)
    exact           = 100 * mean over answers (all its tokens are): greedy decoding says the reference, token by token

One forward for each sample and nothing generated, so it costs seconds. "Before" is the base; its figures are kept
beside the user's other caches, so that they are computed once for each base and subject.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peft_mllm.assets import PLAIN_TEXT
from peft_mllm.attention import backend_of
from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.data.trees import collate_padded
from peft_mllm.errors import DiskError, UserError
from peft_mllm.evaluation import pad_token
from peft_mllm.files import atomic_write, canonical_json, read_sealed, sealed_json
from peft_mllm.models.base import Family
from peft_mllm.provenance import environment
from peft_mllm.record import Record, Turn
from peft_mllm.tuned import Tuned
from peft_mllm.world import World

TEXT = "plain text"
CHUNK = 256
"""Tokens of a piece of plain text: short enough for every model, and for the logits of all of them at once."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """What is measured under one name."""

    name: str
    samples: tuple[Sample, ...]
    answers: bool

    @property
    def digest(self) -> str:
        """Of tokens, labels and images."""
        held = [[s.ids, s.labels, [image.key for image in s.images]] for s in self.samples]
        return hashlib.sha256(canonical_json(held)).hexdigest()


def plain_text(family: Family) -> Subject | None:
    """The package's text as samples; None where the family takes no text alone."""
    probe = Record(id="text", turns=(Turn("user", "?"), Turn("assistant", "!")))
    try:
        shape = family.encode(probe)
    except UserError:
        return None
    samples: list[Sample] = []
    for paragraph in PLAIN_TEXT.read_text(encoding="utf-8").split("\n\n"):
        ids = tuple(family.tokenizer(paragraph.strip())["input_ids"])
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            if len(part) > 1:
                samples.append(_text_sample(f"text-{len(samples)}", part, shape))
    return Subject(TEXT, tuple(samples), answers=False)


def _text_sample(name: str, ids: tuple[int, ...], shape: Sample) -> Sample:
    """Plain tokens with the further arguments that the family's text has; all but the first are predicted."""
    counted = tuple(range(len(ids)))
    return Sample(
        id=name,
        ids=ids,
        labels=(IGNORED, *ids[1:]),
        positions=None if shape.positions is None else (counted,) * len(shape.positions),
        extras={key: values[:1] * len(ids) for key, values in shape.extras.items()},
    )


def answers_of(name: str, records: Sequence[Record], family: Family, *, most: int) -> Subject:
    """The first reference answers of a task."""
    asked = [records[i] for i in range(min(most, len(records)))]
    return Subject(name, tuple(family.encode(record) for record in asked), answers=True)


def measure(tuned: Tuned, subjects: Sequence[Subject], *, rows: int, world: World) -> dict[str, Figures]:
    """Each subject's figures.

    Args:
        tuned: the model.
        subjects: what to measure.
        rows: samples of a batch.
        world: the processes, which share the samples.
    """
    tuned.model.eval()
    return {subject.name: _figures(tuned, subject, rows, world) for subject in subjects}


@torch.no_grad()
def _figures(tuned: Tuned, subject: Subject, rows: int, world: World) -> Figures:
    losses: list[float] = []
    tokens = right = exact = 0.0
    # the same samples meet however many processes there are, so that rounding is the same
    mine = range(world.rank * rows, len(subject.samples), world.size * rows)
    with tuned.in_step():
        for start in mine:
            some = [_within(sample) for sample in subject.samples[start : start + rows]]
            batch = collate_padded(some, pixels=tuned.family.pixels, pad_id=pad_token(tuned)).to(tuned.device)
            logits = tuned.answer_logits(batch).float()  # (A, V)
            hits = logits.argmax(dim=1) == batch.targets
            losses.append(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").item())
            tokens += batch.answer_tokens
            right += hits.sum().item()
            missed = torch.zeros(len(some), dtype=torch.long).index_add_(0, batch.owners.cpu(), (~hits).long().cpu())
            exact += (missed == 0).sum().item()
    loss = world.exact_sum(losses)
    tokens, right, exact = world.sum(tokens, right, exact)
    figures = {"loss": loss / tokens, "token_accuracy": 100 * right / tokens, "tokens": tokens}
    return figures | ({"exact": 100 * exact / len(subject.samples)} if subject.answers else {})


def _within(sample: Sample) -> Sample:
    """Without labels on the first token, which nothing predicts."""
    return sample if sample.labels[0] == IGNORED else replace(sample, labels=(IGNORED, *sample.labels[1:]))


def measure_base(
    tuned: Tuned, subjects: Sequence[Subject], *, fingerprint: str, rows: int, world: World
) -> dict[str, Figures]:
    """Likewise of a base; what was measured before on this machine's kind is taken from the cache.

    Args:
        tuned: the base, untouched.
        subjects: what to measure.
        fingerprint: of the base's weights.
        rows: samples of a batch.
        world: the processes, which share the samples.
    """
    where = environment(world.device)
    machine = [str(where.get(name)) for name in ("torch", "transformers", "device", "machine")]
    known = [fingerprint, machine, backend_of(tuned.decoder), tuned.bf16]
    found: dict[str, Figures] = {}
    for subject in subjects:
        file = cache() / f"{hashlib.sha256(canonical_json([*known, subject.digest])).hexdigest()}.json"
        figures = world.share(_read(file) if world.is_main else None)
        if figures is None:
            figures = measure(tuned, [subject], rows=rows, world=world)[subject.name]
            if world.is_main:
                _write(file, figures)
        found[subject.name] = figures
    return found


def cache() -> Path:
    """Where the bases' figures are: $PEFT_MLLM_CACHE, or the user's cache folder."""
    home = os.environ.get("PEFT_MLLM_CACHE")
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-mllm"
    return (Path(home) if home else users) / "retention"


def _read(file: Path) -> Figures | None:
    """What was kept; a file that is damaged is none."""
    try:
        return {name: float(value) for name, value in read_sealed(file).items()}
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, figures: Figures) -> None:
    """Keep figures; a cache that cannot be written is no harm."""
    with suppress(OSError, DiskError):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, sealed_json(figures))


def retained(before: Mapping[str, Figures], after: Mapping[str, Figures]) -> dict[str, Any]:
    """Both sides of each subject, for result.json."""
    return {name: {"before": dict(before[name]), "after": dict(after[name])} for name in before}


def in_words(retention: Mapping[str, Any]) -> list[str]:
    """A line for each subject."""
    lines = []
    for name, sides in retention.items():
        before, after = sides["before"], sides["after"]
        exact = f", exact {before['exact']:.1f} % -> {after['exact']:.1f} %" if "exact" in before else ""
        lines.append(f"{name}: loss {before['loss']:.3f} -> {after['loss']:.3f}{exact}")
    return lines
