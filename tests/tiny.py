"""Tiny members of every family, small options for every method, and samples to put through them."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from peft_mllm.data.encode import Sample
from peft_mllm.data.trees import Batch, collate, collate_padded, plant
from peft_mllm.methods import METHODS
from peft_mllm.models import MODELS, Family
from peft_mllm.record import ImageSource, Record, Turn
from peft_mllm.tuned import Tuned, attach

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"rank": 4, "bottleneck": 8, "virtual_tokens": 4, "dropout": 0.0}
"""Values that make a method tiny and deterministic, by the name of the option; used where a method has it."""
PEFT_TYPES: dict[str, dict[str, Any]] = {
    "VERA": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "LOHA": {"r": 4},
    "BOFT": {"boft_block_size": 8},
    "LN_TUNING": {"target_modules": r"(model\.language_model|transformer\.h)\..*(layernorm|ln_[12])"},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
}
"""For a method with an option `type`: types of peft, with fields that make them tiny."""


FAMILIES = [pytest.param(name, marks=pytest.mark.slow) if name == "generic" else name for name in MODELS]
"""Every family of the shelf; the members of the generic one have tests of their own (test_generic.py)."""


def method_cases() -> list[tuple[str, dict[str, Any]]]:
    """Every method of the shelf with small options; a method that has types, once for each of some types."""
    cases: list[tuple[str, dict[str, Any]]] = []
    for name in METHODS:
        fields = METHODS[name].Options.model_fields
        small = {option: value for option, value in SMALL.items() if option in fields}
        if "type" in fields:
            cases += [(name, small | {"type": kind, "config": fit}) for kind, fit in PEFT_TYPES.items()]
        else:
            cases.append((name, small))
    return cases


def label(case: tuple[str, dict[str, Any]]) -> str:
    """A case's name in test ids."""
    name, options = case
    return f"{name}-{options['type']}" if "type" in options else name


def method(name: str, **options: Any) -> Any:
    """A method of the shelf with small options, some of them replaced."""
    fields = METHODS[name].Options.model_fields
    small = {option: value for option, value in SMALL.items() if option in fields}
    return METHODS[name](METHODS[name].Options(**(small | options)))


def family(name: str = "llava", *, attn: str | None = None, seed: int = 0) -> Family:
    """A random member with images of four patches.

    Its weights are five times those of a usual start: with those, attention is even, and nothing that looks at
    positions, masks or images would show in a result. To make one takes longer than to copy it.
    """
    made = _made(name, seed)
    made = copy.deepcopy(made, {id(made.tokenizer): made.tokenizer})
    if attn:
        made.model.set_attn_implementation(attn)
    return made


@functools.cache
def _made(name: str, seed: int) -> Family:
    made = MODELS[name].tiny(image_size=28, seed=seed)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return made


def tune(
    name: str, *, on: Family | None = None, seed: int = 0, parts: dict[str, Any] | None = None, **options: Any
) -> Tuned:
    """A method attached to a tiny model, the same for the same seed."""
    torch.manual_seed(seed)
    return attach(on or family(), method(name, **options), **(parts or {}))


def stir(tuned: Tuned, *, spread: float = 0.05, seed: int = 1) -> Tuned:
    """Move everything that trains away from its start, so that identity hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return tuned


@dataclass(frozen=True)
class Picture(ImageSource):
    """An image of noise that is a function of its number."""

    number: int
    size: tuple[int, int] = (40, 30)

    @property
    def key(self) -> str:
        return f"picture {self.number} {self.size}"

    def load(self) -> Image.Image:
        noise = random.Random(self.key).randbytes(self.size[0] * self.size[1] * 3)
        return Image.frombytes("RGB", self.size, noise)


def record(id: str, *texts: str, images: tuple[int, ...] = (), system: str | None = None) -> Record:
    """A conversation: texts of user and assistant in alternation."""
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    first = (Turn("system", system),) if system else ()
    return Record(id=id, turns=first + turns, images=tuple(map(Picture, images)))


def mixed_records() -> list[Record]:
    """Several questions about one image, several images, text alone, several turns; in no order."""
    one = "<image>\n"
    return [
        record("a1", one + "What colour is it?", "red", images=(1,)),
        record("text", "How many are two and two?", "four, I think"),
        record("a2", one + "What colour was it?", "blue or green", images=(1,)),
        record("b1", one + "Where is it?", "left", images=(2,)),
        record("turns", one + "Where is it?", "top left", "And now?", "gone", images=(1,)),
        record("pair1", "Compare <image> with <image>.", "the same", images=(1, 2)),
        record("a3", one + "Is it?", "yes", images=(1,)),
        record("pair2", "Compare <image> with <image>, please.", "not the same", images=(1, 2)),
        record("b2", one + "Where is it?", "right", images=(2,)),
    ]


def few_records() -> list[Record]:
    """Two questions about one image, and text alone."""
    return mixed_records()[:3]


def samples(fam: Family, records: list[Record] | None = None) -> list[Sample]:
    """Records as the family's samples."""
    return [fam.encode(each) for each in (mixed_records() if records is None else records)]


def shared(fam: Family, of: list[Sample], *, share: bool = True) -> Batch:
    """Samples as trees."""
    return collate(plant(of, share=share), pixels=fam.pixels, pad_id=fam.tokenizer.pad_token_id)


def padded(fam: Family, of: list[Sample], *, left: bool = False) -> Batch:
    """Samples as padded rows."""
    return collate_padded(of, pixels=fam.pixels, pad_id=fam.tokenizer.pad_token_id, left=left)


def batch_for(tuned: Tuned, of: list[Sample]) -> Batch:
    """What a run would train on: trees where the method takes them."""
    return shared(tuned.family, of) if tuned.trees else padded(tuned.family, of)


def pixels(fam: Family, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """The forward's arguments for some images, one a row."""
    return fam.pixels([[image] for image in images], torch.zeros(len(images), 1, dtype=torch.long))


def prompts(fam: Family, records: list[Record]) -> Batch:
    """Left-padded prompts without their answers."""
    return padded(fam, [fam.encode(each, answer=False) for each in records], left=True)


def train(tuned: Tuned, batch: Batch, *, steps: int, lr: float) -> Iterator[float]:
    """Adam on one batch; yields each step's loss."""
    optimizer = torch.optim.Adam(tuned.trainable().values(), lr=lr)
    tuned.model.train()
    for _ in range(steps):
        loss = tuned.answer_losses(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
    tuned.model.eval()
