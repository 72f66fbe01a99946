"""A conversation as the tokenizer reads it: images expanded, and the characters and tokens of each answer known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_mllm.models.generic.conversation import Rendered, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Script:
    """Text for a tokenizer.

    Attributes:
        text: with images expanded.
        answers: where answers, and what ends them, stand.
    """

    text: str
    answers: tuple[Span, ...]

    def ended(self, token: str) -> Script:
        """The same with its last answer ended by a token, in the place of whatever else stood after it."""
        start, end = self.answers[-1]
        said = self.text[start:end].rstrip() + token
        return Script(self.text[:start] + said, (*self.answers[:-1], (start, start + len(said))))


@dataclass(frozen=True)
class Tokens:
    """Token ids, and where in the text each stands."""

    ids: tuple[int, ...]
    places: tuple[Span, ...]


def expand(rendered: Rendered, placeholder: str, images: Sequence[str]) -> Script:
    """Put images in the place of their placeholders; answers move accordingly.

    Args:
        rendered: with one placeholder for each image.
        placeholder: what stands for an image.
        images: what comes in the place of each.
    """
    stretches = rendered.text.split(placeholder)
    made, read = stretches[0], len(stretches[0])
    grown: list[tuple[int, int]] = [(0, 0)]  # from this character on, everything stands so much later
    for image, stretch in zip(images, stretches[1:], strict=True):
        made += image + stretch
        read += len(placeholder)
        grown.append((read, grown[-1][1] + len(image) - len(placeholder)))
        read += len(stretch)

    def moved(at: int) -> int:
        return at + next(by for since, by in reversed(grown) if at >= since)

    return Script(made, tuple((moved(start), moved(end)) for start, end in rendered.answers))


def tokenise(script: Script, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> Tokens:
    """Tokenise in one go, but for a token that would go over the start of an answer: that is cut there.

    Generation begins at that place, so a token over it would be learned and never be asked for.

    Args:
        script: what to tokenise.
        tokenizer: gives character offsets.
        special: whether it adds its own first token.
    """
    whole = _tokens(script.text, tokenizer, special=special)
    over = [s for s, _ in script.answers if any(first < s < last for first, last in whole.places)]
    if not over:
        return whole
    ids: list[int] = []
    places: list[Span] = []
    for start, end in zip([0, *over], [*over, len(script.text)], strict=True):
        part = _tokens(script.text[start:end], tokenizer, special=special and start == 0)
        ids += part.ids
        places += [(start + first, start + last) for first, last in part.places]
    return Tokens(tuple(ids), tuple(places))


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> Tokens:
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return Tokens(tuple(encoded["input_ids"]), tuple(encoded["offset_mapping"]))


def learned(script: Script, tokens: Tokens, stops: Collection[int]) -> list[bool]:
    """Whether each token is an answer's, or ends it; what a template writes after the end is not learned."""
    chosen = [False] * len(tokens.ids)
    for start, end in script.answers:
        inside = [i for i, (first, last) in enumerate(tokens.places) if first < end and last > start]
        endings = [i for i in inside if tokens.ids[i] in stops]
        said = start + len(script.text[start:end].rstrip())
        for i in inside:
            chosen[i] = i <= endings[-1] if endings else tokens.places[i][0] < said
    return chosen
