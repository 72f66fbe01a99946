"""A model that answers, token by token, with its adapter or without; it knows no screen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from peft_mllm.data.trees import collate_padded
from peft_mllm.errors import DataError, ModelError
from peft_mllm.evaluation import pad_token
from peft_mllm.record import Record
from peft_mllm.seeds import derive
from peft_mllm.tuned import Tuned

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character, or not yet."""


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without the spaces around it.
        adapter: whether the adapter took part; None where the model has none.
        ended: by itself, at the limit of its length, or because somebody stopped it.
        prompt_tokens: length of what it was asked, images included.
        tokens: length of the answer, its end token included.
        seconds: for both.
    """

    text: str
    adapter: bool | None
    ended: Literal["itself", "length", "stopped"]
    prompt_tokens: int
    tokens: int
    seconds: float


class Voice:
    """Answers records; one at a time, whatever the thread.

    Args:
        tuned: the model, with an adapter or without.
        max_new_tokens: an answer is cut here.
        temperature: 0 always says what is likeliest; above, answers are drawn.
    """

    def __init__(self, tuned: Tuned, *, max_new_tokens: int = 512, temperature: float = 0.0):
        self.tuned = tuned
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._turn = threading.Lock()

    @property
    def has_adapter(self) -> bool:
        """Whether there is something to switch off."""
        return isinstance(self.tuned.model, PeftModel)

    def answer(
        self,
        record: Record,
        *,
        adapter: bool = True,
        say: Callable[[str], object] = lambda piece: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer the record's last turn.

        Args:
            record: its last turn is the assistant's, and is not read.
            adapter: False answers with the base as it was before training.
            say: called with each new piece of text; joined, they are the answer.
            stop: polled after each token; what was said until then is the answer.

        Raises:
            DataError: the conversation is too long for the model.
            MethodError: the adapter cannot be switched off.
            ModelError: the device's memory does not suffice.
        """
        began = time.monotonic()
        with self._turn:
            sample = self.tuned.family.encode(record, answer=False)
            room = self._room(len(sample.ids), adapter=adapter)
            listener = _Listener(self.tuned, len(sample.ids), say, stop)
            torch.manual_seed(derive("chat", record.id))
            self.tuned.model.eval()
            try:
                batch = collate_padded(
                    [sample], pixels=self.tuned.family.pixels, pad_id=pad_token(self.tuned), left=True
                ).to(self.tuned.device)
                with nullcontext(self.tuned) if adapter else self.tuned.untuned() as asked:
                    asked.generate(
                        batch,
                        max_new_tokens=min(self.max_new_tokens, room),
                        stopping_criteria=StoppingCriteriaList([listener]),
                        **self._options(),
                    )
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"The device's memory is too small for a conversation of {len(sample.ids):,} tokens. "
                    "Take questions back with /undo, or start anew with /reset."
                ) from error
        return Answer(
            text=listener.finish(),
            adapter=adapter if self.has_adapter else None,
            ended=listener.ended,
            prompt_tokens=len(sample.ids),
            tokens=len(listener.ids),
            seconds=time.monotonic() - began,
        )

    def _options(self) -> dict[str, Any]:
        """How to generate: the evaluation's way, or drawn at a temperature."""
        drawn = {"temperature": self.temperature} if self.temperature else {}
        return {
            "do_sample": bool(self.temperature),
            "num_beams": 1,
            "eos_token_id": list(self.tuned.family.stops) or None,
            "pad_token_id": pad_token(self.tuned),
            **drawn,
        }

    def _room(self, asked: int, *, adapter: bool) -> int:
        """How many tokens an answer may have at most."""
        limit = getattr(self.tuned.decoder.config, "max_position_embeddings", None)
        if limit is None:
            return self.max_new_tokens
        if adapter and self.has_adapter:
            limit -= getattr(self.tuned.model.active_peft_config, "num_virtual_tokens", None) or 0
        if asked >= limit:
            raise DataError(
                f"The conversation is too long: {asked:,} tokens, images included, where the model takes {limit:,} "
                "and an answer needs some. Take questions back with /undo, or start anew with /reset."
            )
        return limit - asked


class _Listener(StoppingCriteria):
    """Hears each token as it is generated, and says when to stop."""

    def __init__(self, tuned: Tuned, start: int, say: Callable[[str], object], stop: Callable[[], bool]):
        self._tuned, self._start, self._say, self._stop = tuned, start, say, stop
        self._text = GrowingText(tuned.family.tokenizer)
        self.ids: list[int] = []
        self._stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether to stop, (1,) bool, after the last of `input_ids` (1, T)."""
        self.ids = input_ids[0, self._start :].tolist()
        self._hand_on(self._text.grow(self.ids))
        self._stopped = self._stop()
        return torch.full((len(input_ids),), self._stopped, dtype=torch.bool, device=input_ids.device)

    @property
    def ended(self) -> Literal["itself", "length", "stopped"]:
        if self.ids and self.ids[-1] in self._tuned.family.stops:
            return "itself"
        return "stopped" if self._stopped else "length"

    def finish(self) -> str:
        self._hand_on(self._text.finish(self.ids, cut=self.ended != "itself"))
        return self._text.said

    def _hand_on(self, piece: str) -> None:
        if piece:
            self._say(piece)


class GrowingText:
    """The text of a growing list of tokens, in pieces that never have to be taken back.

    The whole list is decoded each time, because a token's text may depend on those before it: a character may be
    several tokens, and a space at the front belongs to none. What may still change is held back.

    Attributes:
        said: all pieces joined.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.said = ""

    def grow(self, ids: Sequence[int]) -> str:
        """The new piece, maybe empty; `ids` are all tokens so far."""
        return self._piece(_without_broken_end(self._decoded(ids)))

    def finish(self, ids: Sequence[int], *, cut: bool) -> str:
        """The last piece. Where the answer was cut, a character that is not whole is left out."""
        whole = self._decoded(ids)
        return self._piece(_without_broken_end(whole) if cut else whole.rstrip())

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).lstrip()

    def _piece(self, text: str) -> str:
        # half a character may spoil the whole ones before it, until its other half is there
        piece = text[len(self.said) :] if text.startswith(self.said) else ""
        self.said += piece
        return piece


def _without_broken_end(text: str) -> str:
    """Without spaces and broken characters at the end."""
    while text and (text[-1] == BROKEN or text[-1].isspace()):
        text = text[:-1]
    return text
