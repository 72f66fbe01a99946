"""What a model in pieces can do, whoever cuts it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import nn

from peft_mllm.anatomy import Anatomy
from peft_mllm.pieces import in_pieces, whole

Shard = Literal["none", "fsdp", "zero3"]
Number = TypeVar("Number", int, float)


class Shards(ABC):
    """A model of whose decoder each process holds a piece.

    Its layers, embeddings and head are cut; vision tower, connector, what a method adds, and tied embeddings are whole
    in every process. A layer is put together for the time that it is computed.

    Attributes:
        unsaid: bytes of weights that a process has at once, beyond what the model's parameters say.
        hidden: bytes that it holds all the time and the parameters do not say.
    """

    unsaid: int
    hidden: int = 0

    @abstractmethod
    def together(self) -> AbstractContextManager[None]:
        """Until all processes are at its end, each computes as often as it likes, without gradients."""

    @abstractmethod
    def put_together(self, layer: nn.Module) -> AbstractContextManager[None]:
        """A decoder layer's weights are whole until the context ends; all processes must enter."""

    @abstractmethod
    def apart(self) -> AbstractContextManager[None]:
        """Until the context ends no module puts anything together: it is to be run without numbers."""

    def most(self, value: Number) -> Number:
        """The highest value of all processes; what is no number in one is none in all."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return next((each for each in values if each != each), max(values))


@contextmanager
def whole_for(model: nn.Module, *, here: bool) -> Iterator[None]:
    """Until the context ends, a model's trained weights are whole in main memory; all processes must enter.

    Args:
        model: any module; one without pieces stays as it is.
        here: whether this process is to have them; the others help.
    """
    made: dict[int, nn.Parameter] = {}
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, piece in module._parameters.items():
                if piece is None or not in_pieces(piece):
                    continue
                if id(piece) not in made:
                    together = whole(piece.detach())
                    made[id(piece)] = nn.Parameter(together.cpu(), requires_grad=piece.requires_grad) if here else piece
                before.append((module, name, piece))
        for module, name, piece in before:
            module._parameters[name] = made[id(piece)]
        yield
    finally:
        for module, name, piece in before:
            module._parameters[name] = piece


def alike(layers: nn.Module) -> list[nn.Module]:
    """Those of a decoder's layers that are of the commonest kind: others may be skipped, as for want of an image."""
    found = list(layers.children())
    commonest = Counter(map(type, found)).most_common(1)[0][0]
    return [layer for layer in found if type(layer) is commonest]


def stays_whole(base: Any, anatomy: Anatomy) -> set[nn.Parameter]:
    """Parameters of tower and connector, and of embeddings and head where they cannot be cut.

    A text needs no tower, so processes would ask for it at different times. Embeddings that are the head as well are
    needed twice, and the gradient of embeddings that train comes when the decoder's are done. A head that lies in the
    decoder is called when that has ended.
    """
    modules = [base.get_submodule(name) for name in (*anatomy.vision, *anatomy.connector)]
    table, head, decoder = base.get_input_embeddings(), base.get_output_embeddings(), base.get_submodule(anatomy.llm)
    heads = [head] if head is not None else []
    tied = {id(p) for p in table.parameters()} & {id(p) for head in heads for p in head.parameters()}
    if tied or any(p.requires_grad for p in table.parameters()):
        modules.append(table)
    if tied or any(module is head for module in decoder.modules()):
        modules += heads
    return {parameter for module in modules for parameter in module.parameters()}
