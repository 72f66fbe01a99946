"""The contract of a family: load one architecture, name its parts, turn records into tokens and pixels."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_mllm.anatomy import Anatomy
from peft_mllm.errors import DataError, ModelError
from peft_mllm.record import IMAGE_MARK, Record

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_mllm.data.encode import Sample


Labels = Literal["answer", "upstream"]
"""What is learned: the answers, or what the model's own authors supervised."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        dtype: torch's name of the weights' type, or `auto`; `stored` leaves each tensor of an `original` checkpoint
            in its own, to be written and not run.
        attn_implementation: transformers' name of the attention backend.
        vision_tower: directory or hub id of the tower, for a checkpoint that comes without its own.
        quantization: a transformers quantization config; None keeps the weights as they are.
        anatomy: fields of the anatomy that a user declares, for a family that would find them.
        weights: False makes the model on the meta device, from its config alone: to look at, not to run.
    """

    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    vision_tower: str | None = None
    quantization: Any = None
    anatomy: Mapping[str, Any] | None = None
    weights: bool = True


class Family(ABC):
    """A loaded model of one architecture, with what it needs to read text and images.

    A family is final: it derives from this class and nothing derives from it.

    Attributes:
        anatomy: names of the parts, for the methods.
        model: the transformers model.
        tokenizer: its tokenizer.
        trees: whether samples of one image may be tried as one tree; a model whose mask is not causal says no.
        reach: tokens up to which nothing that a prompt's first tokens compute depends on its length; None is any.
        notes: what a user should know of how this model was put together.
        patches: positions that the vision tower computes for an image; 0 where that depends on the image.
        is_twin: whether another model has the same weights in memory: then what trains of them must be copied.
    """

    anatomy: Anatomy
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trees: bool = True
    reach: int | None = None
    notes: tuple[str, ...] = ()
    patches: int = 0
    is_twin: bool = False

    @classmethod
    @abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is of this family."""

    @classmethod
    def original(cls, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` of this family is in its authors' own layout, which transformers does not load."""
        return False

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, *, loading: Loading) -> Family:
        """Load a local directory or hub id.

        Raises:
            ModelError: the source cannot be used; says why and what to do.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, *, image_size: int = 56, seed: int = 0) -> Family:
        """A random member with few parameters, made offline in milliseconds; for tests and dry runs."""

    @classmethod
    def tiny_member(cls, member: str, *, image_size: int = 56, seed: int = 0) -> Family:
        """A random member of one architecture, for a family of several.

        Raises:
            ModelError: the family has no such member.
        """
        raise ModelError(f"{cls.__name__} is one architecture: there is no member '{member}' of it.")

    @classmethod
    def tiny_members(cls) -> tuple[str, ...]:
        """The names of all that `tiny_member` makes; none for a family of one architecture."""
        return ()

    @abstractmethod
    def encode(self, record: Record, *, answer: bool = True, labels: Labels = "answer") -> Sample:
        """A record as token ids, labels and images.

        Args:
            record: its last turn is the assistant's.
            answer: False leaves the last answer out and ends where the model is to begin it.
            labels: what is learned; `upstream` differs only where the model's authors supervised more.
        """

    @abstractmethod
    def pixels(self, images: Sequence[Sequence[Image]], input_ids: Tensor) -> dict[str, Tensor]:
        """Images as the keyword arguments of the model's forward.

        Args:
            images: RGB, those of each row of a batch; there is at least one in all.
            input_ids: (R, T) the rows' tokens, for models whose image arguments depend on them.
        """

    @property
    @abstractmethod
    def image_settings(self) -> Mapping[str, Any]:
        """What decides pixels beside the images: the settings of the image processor."""

    def twin(self) -> Family:
        """Another model on the same weights, to put a method on: they are in memory once."""
        family = copy.copy(self)
        shared = {id(tensor): _same_numbers(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        family.model, family.is_twin = copy.deepcopy(self.model, shared), True
        return family

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (A, V) of the decoder's hidden states (A, D): the head alone, unless a model does more."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        end = self.tokenizer.eos_token_id
        return () if end is None else (end,)

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write model, tokenizer and processor as a directory that plain transformers loads."""


def _same_numbers(tensor: Tensor) -> Tensor:
    """A parameter of its own on the same memory; one of a special kind, or a buffer, is itself."""
    from torch import nn

    return nn.Parameter(tensor.data, requires_grad=False) if type(tensor) is nn.Parameter else tensor


def check_marks(record: Record) -> None:
    """Hold a record's marks against its images: users show them, one for each mark.

    Raises:
        DataError: a mark stands in another's turn, or there are more or fewer marks than images.
    """
    place = record.source or record.id
    if any(IMAGE_MARK in turn.text for turn in record.turns if turn.role != "user"):
        raise DataError(f"{place}: {IMAGE_MARK} stands in a turn that is not the user's. Only a user shows images.")
    places = sum(turn.text.count(IMAGE_MARK) for turn in record.turns)
    if places != len(record.images):
        raise DataError(
            f"{place}: {places} {IMAGE_MARK} marks for {len(record.images)} images. "
            f"Write one {IMAGE_MARK} for each image."
        )
