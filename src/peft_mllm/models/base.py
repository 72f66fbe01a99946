"""The contract of a family: load one architecture, name its parts, turn records into tokens and pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft_mllm.anatomy import Anatomy
from peft_mllm.record import Record

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_mllm.data.encode import Sample


class Family(ABC):
    """A loaded model of one architecture, with what it needs to read text and images.

    A family is final: it derives from this class and nothing derives from it.

    Attributes:
        anatomy: names of the parts, for the methods.
        model: the transformers model.
        tokenizer: its tokenizer.
    """

    anatomy: ClassVar[Anatomy]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    @abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is of this family."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, *, dtype: str, attn_implementation: str) -> Family:
        """Load a local directory or hub id; `dtype` is a torch name, or `auto`.

        Raises:
            ModelError: the source cannot be used; says why and what to do.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, *, image_size: int = 56, seed: int = 0) -> Family:
        """A random member with few parameters, made offline in milliseconds; for tests and dry runs."""

    @abstractmethod
    def encode(self, record: Record, *, answer: bool = True) -> Sample:
        """A record as token ids, labels and images.

        Args:
            record: its last turn is the assistant's.
            answer: False leaves the last answer out and ends where the model is to begin it.
        """

    @abstractmethod
    def pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Images (RGB, N of them) as the keyword arguments of the model's forward, N >= 1."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write model, tokenizer and processor as a directory that plain transformers loads."""
