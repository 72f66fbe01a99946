r"""Penn Treebank tokens, as the caption scorers take them from Stanford's PTBTokenizer.

COCO's caption scorer (Chen et al. 2015, arXiv 1504.00325) tokenises references and captions by a Java program:
CoreNLP 3.4.1, `PTBTokenizer -preserveLines -lowerCase`. This is what it does, in Python: a lexer. At each place
every rule is tried; the longest match wins, the context that it looks at included, and of equals the first.

All captions are one text with a line for each, because the program reads on over a line's end: an abbreviation at
the end of a line is followed by a full stop of its own if the next line begins with a capital letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft_mllm.metrics.text.ptb_rules import RULES, SHOWN

# What the scorer drops. It compares after lower-casing, so brackets, by then `-lrb-`, stay: its own slip, kept.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_SKIPPED = re.compile(r"(?:[ \t\u00A0\u2000-\u200A\u3000]|(?i:&nbsp;))+")
_LINE_ENDS = re.compile(r"\r\n|[\r\n\u2028\u2029\x0b\x0c\x85]")
# A plain word before a space or line's end is what it is, unless it is one of those that are split.
_PLAIN = re.compile(r"[A-Za-z]+(?=[ \n])")
_SPLIT = frozenset({"cannot", "gonna", "gotta", "lemme", "gimme", "wanna"})


def tokenise(captions: Sequence[str]) -> list[str]:
    """The tokens of each caption, without punctuation, joined by single spaces: what the scorers compare."""
    return [" ".join(token for token in line if token not in PUNCTUATION) for line in ptb_tokens(captions)]


def ptb_tokens(captions: Sequence[str]) -> list[list[str]]:
    """The tokens of each caption in lower case, punctuation included."""
    text = "\n".join(_LINE_ENDS.sub(" ", caption) for caption in captions)
    lines: list[list[str]] = [[]]
    at = 0
    while at < len(text):
        if text[at] == "\n":
            lines.append([])
            at += 1
        elif space := _SKIPPED.match(text, at):
            at = space.end()
        else:
            token, at = _next(text, at)
            lines[-1] += [token.lower()] if token else []
    return lines[: len(captions)]


def _next(text: str, at: int) -> tuple[str, int]:
    """The token at a place, and where it ends."""
    plain = _PLAIN.match(text, at)
    if plain and plain[0].lower() not in _SPLIT:
        return plain[0], plain.end()
    best, longest = None, 0
    for rule in RULES:
        found = rule.pattern.match(text, at)
        if found and found.end() > at + longest:
            best, longest = (rule, found), found.end() - at
    if best is None:
        return text[at] if SHOWN.match(text, at) else "", at + 1
    rule, found = best
    taken, end = found["t"], found.end("t")
    if rule.keep is None:
        return rule.write(taken), end
    if rule.keep > 0:
        return taken[: rule.keep], at + rule.keep
    return taken, end + rule.keep  # the last character is also a token of its own
