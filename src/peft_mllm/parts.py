"""How big the parts of a model are, each parameter counted once: what costs are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_mllm.anatomy import Anatomy
from peft_mllm.quantization import size_of

NAMES = ("llm", "lm_head", "connector", "vision", "elsewhere")


@dataclass(frozen=True)
class ModelPart:
    """A part of a model.

    Attributes:
        name: llm, lm_head, connector, vision, or elsewhere: what is in no part, and never trains.
        modules: dotted paths; elsewhere, of parameters.
        parameters: how many numbers; those that two parts share count for the first.
    """

    name: str
    modules: tuple[str, ...]
    parameters: int


def parts_of(model: nn.Module, anatomy: Anatomy) -> list[ModelPart]:
    """All parts in the order of `NAMES`; a head that is tied to the embeddings has no parameters of its own."""
    named = {
        "connector": anatomy.connector,
        "vision": anatomy.vision,
        "llm": (anatomy.llm,),
        "lm_head": (anatomy.lm_head,),
    }
    counted: set[int] = set()
    # a decoder stack may hold connector and tower, so it is counted after them
    sizes = {name: _count(model, modules, counted) for name, modules in named.items()}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in counted}
    named["elsewhere"], sizes["elsewhere"] = tuple(rest), sum(map(size_of, rest.values()))
    return [ModelPart(name, named[name], sizes[name]) for name in NAMES]


def _count(model: nn.Module, modules: Sequence[str], counted: set[int]) -> int:
    total = 0
    for path in modules:
        for parameter in model.get_submodule(path).parameters():
            total += 0 if id(parameter) in counted else size_of(parameter)
            counted.add(id(parameter))
    return total


def sizes_of(model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """What the formulas for FLOPs need of a base, for result.json.

    Returns:
        parts: parameters by part, all of `NAMES`; embeddings: parameters of the token table, which are in `llm` (or
        wherever the family has them) and compute nothing; layers: of the decoder; width: of its hidden states.
    """
    decoder: Any = model.get_submodule(anatomy.llm)
    table = decoder.get_input_embeddings().weight  # (V, D)
    return {
        "parts": {part.name: part.parameters for part in parts_of(model, anatomy)},
        "embeddings": size_of(table),
        "layers": len(list(model.get_submodule(anatomy.layers).children())),
        "width": int(table.shape[1]),
    }
