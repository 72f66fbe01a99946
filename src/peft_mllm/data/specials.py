"""Control tokens inside a record's text: what a person wrote, and the model reads as a command.

Every model marks turns and ends with tokens of its own. Whether such a word in a text becomes that token depends on
how the family tokenises it, so it is tried: the record is encoded with the word and without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from peft_mllm.data.encode import Sample
from peft_mllm.data.problems import Problem, problem
from peft_mllm.errors import DataError
from peft_mllm.record import IMAGE_MARK, Record, Turn

MEANT = frozenset({IMAGE_MARK, "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"})
"""Special tokens that belong into text."""


class Specials:
    """Finds the special tokens of one model.

    Args:
        encode: a family's encoding.
        tokenizer: its tokenizer.
    """

    def __init__(self, encode: Callable[[Record], Sample], tokenizer: Any):
        self._encode = encode
        self._tokenizer = tokenizer
        words = {str(token) for token in tokenizer.all_special_tokens}
        words |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted((word for word in words - MEANT if word), key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def problems(self, record: Record) -> Iterator[Problem]:
        """Each turn's special tokens, each told once."""
        for i, turn in enumerate(record.turns):
            for word in dict.fromkeys(self._words.findall(turn.text)):
                if self._is_read(record, i, word):
                    yield problem("special-token-read", turn=i + 1, token=word)

    def _is_read(self, record: Record, i: int, word: str) -> bool:
        """Whether the word becomes its token: without it, there are fewer of them."""
        without = Turn(record.turns[i].role, record.turns[i].text.replace(word, " - "))
        other = replace(record, turns=(*record.turns[:i], without, *record.turns[i + 1 :]))
        token = self._tokenizer.convert_tokens_to_ids(word)
        try:
            return self._encode(record).ids.count(token) > self._encode(other).ids.count(token)
        except DataError:
            return False  # it cannot be encoded at all, which is a finding of its own
