from __future__ import annotations

import pytest

from peft_mllm.errors import DataError
from peft_mllm.metrics import METRICS
from peft_mllm.metrics.exact import Exact
from peft_mllm.record import Record, Turn


def records(*answers: str) -> list[Record]:
    return [Record(str(n), (Turn("user", "q"), Turn("assistant", answer))) for n, answer in enumerate(answers)]


def test_case_and_space_are_forgiven_and_nothing_else() -> None:
    scores = Exact().score([" A Cat\n", "a cat.", "", "dog"], records("a cat", "a cat", "x", "Dog "))
    assert scores.per_question == [1.0, 0.0, 0.0, 1.0]
    assert scores.values == {"accuracy": 50.0}
    assert scores.headline == 50.0
    assert scores.parsed == ["a cat", "a cat.", None, "dog"]
    assert scores.unparsed == 1


def test_is_on_the_shelf() -> None:
    assert METRICS["exact"] is Exact


def test_needs_something_to_score() -> None:
    with pytest.raises(DataError):
        Exact().score([], [])
    with pytest.raises(ValueError):
        Exact().score(["a"], records("a", "b"))
