"""One method on one tiny model: fresh copies of both, moved from their start, and conversations to put through.

A tiny model's weights are made three times larger: with those of a usual start attention is even, and nothing that
looks at positions, masks or images would show in a result.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.data.trees import Batch, collate_padded
from peft_mllm.evaluation import pad_token
from peft_mllm.matrix.candidates import Candidate
from peft_mllm.methods.base import Method
from peft_mllm.models import Family
from peft_mllm.record import ImageSource, Record, Turn
from peft_mllm.tuned import Tuned, attach

if TYPE_CHECKING:
    from PIL.Image import Image

SHARPENED = 3.0
EXPERT = Candidate("expert", "lora", {"rank": 2, "dropout": 0.0})
SEED = 1


@dataclass(frozen=True)
class Noise(ImageSource):
    """An image of noise, a function of its number and size; wider than high, so that rows and columns differ."""

    number: int
    size: tuple[int, int] = (84, 56)

    @property
    def key(self) -> str:
        """Equal keys mean equal pixels."""
        return f"noise {self.number} {self.size}"

    def load(self) -> Image:
        """Draw it."""
        from PIL import Image

        width, height = self.size
        return Image.frombytes("RGB", self.size, random.Random(self.key).randbytes(width * height * 3))


def conversation(id: str, question: str, answer: str, image: int) -> Record:
    """One question about one image."""
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    return Record(id=id, turns=turns, images=(Noise(image),))


RECORDS: tuple[Record, ...] = (
    conversation("a1", "What colour is it?", "red", 1),
    conversation("a2", "What colour was it?", "blue or green", 1),
    conversation("b1", "Where is it?", "left", 2),
)
"""Two images, and two questions about one of them: a tree with branches of unequal length, and one alone."""


def sharpen(family: Family) -> Family:
    """A tiny model with weights that make differences show; the same object."""
    with torch.no_grad():
        for parameter in family.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SHARPENED)
    return family


@dataclass(frozen=True)
class Bench:
    """A candidate and the model it is tried on.

    Attributes:
        candidate: the method as it is tried.
        pristine: the tiny model; it is copied, never touched.
        folder: for files, of this bench alone.
    """

    candidate: Candidate
    pristine: Family
    folder: Path

    def family(self) -> Family:
        """A copy of the model; what only reads text and images is shared."""
        shared = {id(self.pristine.tokenizer): self.pristine.tokenizer}
        return copy.deepcopy(self.pristine, shared)

    def tune(self, *, connector: bool = False, checkpointing: bool = False, stirred: bool = False) -> Tuned:
        """The method on a copy; the same each time. `stirred` moves what trains away from its start."""
        family = self.family()
        method = self._method(family)
        torch.manual_seed(SEED)
        tuned = attach(family, method, connector=connector, recompute="full" if checkpointing else "none")
        tuned.model.eval()
        return stir(tuned) if stirred else tuned

    def _method(self, family: Family) -> Method[Any]:
        """The candidate's method, with what only the model can say filled in."""
        options = dict(self.candidate.options)
        config = dict(options.get("config", {}))
        if "token_indices" in config:
            config["token_indices"] = sorted({label for label in samples(family)[0].labels if label != IGNORED})
        if "adapters" in config:
            config["adapters"] = self._experts()
            config["hidden_size"] = family.model.get_submodule(family.anatomy.llm).config.hidden_size
        return replace(self.candidate, options=options | {"config": config} if config else options).build()

    def _experts(self) -> dict[str, str]:
        """Directories of two saved LoRAs, for a mixture of adapters."""
        saved = {name: self.folder / "experts" / name for name in ("one", "other")}
        for path in saved.values():
            if not path.exists():
                stir(attach(self.family(), EXPERT.build())).save(path)
        return {name: str(path) for name, path in saved.items()}


def stir(tuned: Tuned, *, spread: float = 0.05) -> Tuned:
    """Move everything that trains away from its start, so that identity hides nothing; the same object."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return tuned


def samples(family: Family, *, answer: bool = True) -> list[Sample]:
    """The conversations as a family's samples."""
    return [family.encode(record, answer=answer) for record in RECORDS]


def padded(tuned: Tuned, of: Sequence[Sample], *, left: bool = False) -> Batch:
    """Samples as padded rows: every method can compute those."""
    return collate_padded(of, pixels=tuned.family.pixels, pad_id=pad_token(tuned), left=left)


def everywhere(batch: Batch) -> Batch:
    """A batch of one row with predictions read at all its columns."""
    columns = torch.arange(batch.input_ids.shape[1])
    return replace(batch, rows=torch.zeros_like(columns), columns=columns)


@torch.no_grad()
def logits_of(tuned: Tuned) -> Tensor:
    """(T, V) of the first conversation, in evaluation mode."""
    tuned.model.eval()
    torch.manual_seed(SEED)
    return tuned.answer_logits(everywhere(padded(tuned, samples(tuned.family)[:1])))


def difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference, as a part of the largest magnitude of `one`."""
    return ((one - other).abs().max() / one.abs().max()).item()
