"""The probe: fixed questions about painted images, which need no data, and what a model makes of them.

Each conversation is a row of its own without padding, so that any model and method takes it as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.data.trees import Batch, collate_padded
from peft_mllm.evaluation import pad_token
from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.scenes import COLUMNS, ROWS, SceneImage, make_scene
from peft_mllm.tuned import Tuned

CONVERSATIONS = 4


@dataclass(frozen=True)
class Heard:
    """What a model makes of some conversations.

    Attributes:
        logits: float32 (n_i, V) of each: those that predict the tokens after its last image.
        loss: mean cross-entropy of the answers' tokens.
        inputs: of each, the keyword arguments of a plain forward.
        columns: of each, the n_i positions where the logits are read.
    """

    logits: tuple[Tensor, ...]
    loss: float
    inputs: tuple[dict[str, Tensor], ...]
    columns: tuple[Tensor, ...]

    @property
    def positions(self) -> int:
        """How many predictions there are in all."""
        return sum(len(columns) for columns in self.columns)

    @property
    def digest(self) -> str:
        """A sha256 over all that was asked."""
        total = hashlib.sha256()
        for inputs, columns in zip(self.inputs, self.columns, strict=True):
            for name, tensor in sorted({**inputs, "columns": columns}.items()):
                total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update((tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy().tobytes())
        return total.hexdigest()


def probe_records() -> list[Record]:
    """The conversations: one question about one cell of one scene each."""
    records = []
    for number in range(CONVERSATIONS):
        scene = make_scene(f"probe {number}")
        row, column = number % len(ROWS), (2 * number + 1) % len(COLUMNS)
        asked = f"{IMAGE_MARK}\nWhat is at the {ROWS[row]} {COLUMNS[column]}?"
        turns = (Turn("user", asked), Turn("assistant", scene.at(row, column)))
        records.append(Record(id=f"probe-{number}", turns=turns, images=(SceneImage(scene),)))
    return records


@torch.no_grad()
def hear(tuned: Tuned, records: Sequence[Record]) -> Heard:
    """Ask a model conversations, one by one, and keep its logits."""
    tuned.model.eval()
    logits, inputs, columns, losses = [], [], [], []
    for batch, learned in _rows(tuned, records):
        answered = tuned.answer_logits(batch.to(tuned.device)).float().cpu()
        losses.append(cross_entropy(answered[learned], batch.targets[learned], reduction="none"))
        logits.append(answered)
        columns.append(batch.columns)
        words = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        inputs.append({**words, **batch.pixels, **batch.extras})
    return Heard(tuple(logits), torch.cat(losses).mean().item(), tuple(inputs), tuple(columns))


@torch.no_grad()
def answer_loss(tuned: Tuned, records: Sequence[Record]) -> float:
    """The mean cross-entropy of the tokens of all answers."""
    tuned.model.eval()
    family, pad_id = tuned.family, pad_token(tuned)
    rows = (collate_padded([family.encode(record)], pixels=family.pixels, pad_id=pad_id) for record in records)
    return torch.cat([tuned.answer_losses(row.to(tuned.device)) for row in rows]).mean().item()


def largest_difference(mine: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference of logits, relative to the largest of `others`; NaN where one is not finite."""
    if any(a.shape != b.shape for a, b in zip(mine, others, strict=True)):
        return float("nan")
    apart = torch.stack([(a - b).abs().max() for a, b in zip(mine, others, strict=True)]).max()
    return (apart / torch.stack([b.abs().max() for b in others]).max()).item()


def _rows(tuned: Tuned, records: Sequence[Record]) -> Iterator[tuple[Batch, Tensor]]:
    """Each record as a batch that predicts all tokens after its last image, and which of them are learned."""
    family = tuned.family
    for record in records:
        sample = family.encode(record)
        begin = max(sample.image_end, 1)
        batch = collate_padded([_all_learned(sample, begin)], pixels=family.pixels, pad_id=pad_token(tuned))
        yield batch, torch.tensor([label != IGNORED for label in sample.labels[begin:]])


def _all_learned(sample: Sample, begin: int) -> Sample:
    return replace(sample, labels=(IGNORED,) * begin + sample.ids[begin:])
