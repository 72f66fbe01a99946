"""Greedy answers to the questions of several images together; what the questions of an image share is computed once.

    1. prefixes    [system ... USER: image]                    a row for each image, into a cache
    2. questions   [What is it? ASSISTANT:][Where is it? ...]  side by side behind their prefix
    3. answers     a token of each open question in each step, likewise

A token sees its row's prefix and its own question and answer, by a mask over the cache's columns, and its position is
what it is in its own prompt: so the answers are those of transformers' generate, which cannot begin like this. Keys
and values of a prefix are kept once for all its questions, and finished rows leave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from peft_mllm.attention import PADDING, PREFIX, additive, backend_of, tree_mask
from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.data.seeing import arguments_of
from peft_mllm.data.trees import Tree, collate_padded, plant, positions_of
from peft_mllm.exactness import same_logits, tried
from peft_mllm.proof import Proof
from peft_mllm.tuned import Tuned

PROOF = "decoding"
"""Its name among a model's proofs."""
ABREAST = 8
"""Questions of a row, at most: each computes its scores against the columns of the others, only to mask them."""
LEAVE = 0.75
"""Rows leave the cache once no more than this share of them has open questions; leaving copies what stays."""
UNDERSTOOD = {"do_sample", "num_beams", "max_new_tokens", "eos_token_id", "pad_token_id", "temperature", "top_p"}
"""Options of transformers' generate that are known here."""
NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    dict.fromkeys(("guidance_scale", "encoder_repetition_penalty"), (None, 1))
    | dict.fromkeys(
        (
            "sequence_bias", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "min_length",
            "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
            "suppress_tokens", "begin_suppress_tokens", "watermarking_config", "stop_strings", "max_time",
            "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "token_healing", "constraints",
            "force_words_ids", "remove_invalid_values",
        ),
        (None, 0, False),
    )
)  # fmt: skip
"""What a model's generation config may say of greedy decoding beside its repetition penalty, so that we follow it."""
PER_TOKEN = ("cross_attention_mask",)
"""Arguments made from images that have one entry for each token: what follows the prefix has its last token's."""


@dataclass(frozen=True)
class Rules:
    """How answers are decoded.

    Attributes:
        limit: new tokens of an answer, at most.
        stops: tokens that end it.
        penalty: of tokens that stand before, as the model's generation config has it; 1 is none.
        pad_id: token id under padding.
    """

    limit: int
    stops: frozenset[int]
    penalty: float
    pad_id: int


def rules_of(tuned: Tuned, told: Mapping[str, object]) -> Rules | None:
    """The rules of options for transformers' generate; None where they are not followed here."""
    config = tuned.base.generation_config
    if told.get("do_sample") or told.get("num_beams", 1) != 1 or not told.keys() <= UNDERSTOOD:
        return None
    if any(getattr(config, name, None) not in neutral for name, neutral in NEUTRAL.items()):
        return None
    ends: Any = told.get("eos_token_id") or getattr(config, "eos_token_id", None) or ()
    limit, pad_id = told["max_new_tokens"], told["pad_token_id"]
    assert isinstance(limit, int)
    assert isinstance(pad_id, int)
    return Rules(
        limit=limit,
        stops=frozenset(ends if isinstance(ends, (list, tuple)) else (ends,)),
        penalty=getattr(config, "repetition_penalty", None) or 1.0,
        pad_id=pad_id,
    )


class Decoder:
    """One model's way to answer prompts with shared prefixes, where it has one.

    Before a model's first answer this way is held against the plain computation, once, whatever it is asked later: it
    may be any model that transformers has, and two prompts more than all that are asked cost little.

    Args:
        tuned: the model.
        told: options of transformers' generate.
    """

    def __init__(self, tuned: Tuned, told: Mapping[str, object]):
        self._tuned = tuned
        self._rules = rules_of(tuned, told) if tuned.trees else None

    def takes(self, samples: Sequence[Sample]) -> bool:
        """Whether prompts have something to share, and the answers are those of transformers' generate."""
        reach = self._tuned.family.reach
        if self._rules is None or any(sample.image_end >= len(sample.ids) for sample in samples):
            return False
        if reach is not None and any(len(sample.ids) > reach for sample in samples):
            return False
        if not any(tree.branched for tree in plant(samples, share=True)):
            return False
        proofs, rules = self._tuned.proofs, self._rules
        if PROOF not in proofs:  # a cache may be of another kind, or none: transformers' generate knows how
            proofs[PROOF] = tried(lambda: _prove(self._tuned, samples, rules))
        return proofs[PROOF].passed

    def answer(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The new tokens of each prompt, with what ends them."""
        assert self._rules is not None, "asked whether these prompts are taken"
        return decode(self._tuned, samples, self._rules)


@torch.no_grad()
def decode(tuned: Tuned, samples: Sequence[Sample], rules: Rules) -> list[list[int]]:
    """The greedy answer to each prompt, as token ids with the one that ends it."""
    grove = _Grove(tuned, plant(samples, share=True), rules)
    grove.ask()
    while grove.open:
        grove.go_on()
    said = {id(branch.sample): branch.said for branch in grove.branches}
    return [said[id(sample)] for sample in samples]


@dataclass
class _Branch:
    """A question on its way.

    Attributes:
        number: its segment.
        sample: its prompt.
        shared: tokens of the prompt that stand in the prefix.
        row: of the cache, at present.
        said: the answer's tokens so far.
    """

    number: int
    sample: Sample
    shared: int
    row: int
    said: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Piece:
    """Tokens that come next in a row: ids, their positions (P, n), and further arguments of the forward."""

    row: int
    segment: int
    ids: Sequence[int]
    positions: Tensor
    extras: Mapping[str, Sequence[int]]


class _Grove:
    """Trees that grow: a cache with a row for each, and what stands in its columns.

    Args:
        tuned: the model.
        trees: prompts without answers.
        rules: of decoding.
    """

    def __init__(self, tuned: Tuned, trees: Sequence[Tree], rules: Rules):
        self._tuned, self._rules = tuned, rules
        self._cache = DynamicCache()  # not of the config: a window would drop columns that a mask still counts
        samples = [sample for tree in trees for sample in tree.samples]
        self._axes = max(len(sample.positions or (0,)) for sample in samples)
        self._extras = {name for sample in samples for name in sample.extras}
        self._segments = torch.empty(len(trees), 0, dtype=torch.long, device=tuned.device)
        self._per_token: dict[str, Tensor] = {}
        self.branches: list[_Branch] = []
        origins: list[int] = []  # the tree of each row
        for number, tree in enumerate(trees):
            rows = math.ceil(len(tree.samples) / ABREAST)
            for i, sample in enumerate(tree.samples):
                self.branches.append(_Branch(len(self.branches), sample, _shared(tree), len(origins) + i % rows))
            origins += [number] * rows
        self.open = list(self.branches)
        self._compute_prefixes(trees)
        if len(origins) > len(trees):
            self._keep(origins)

    def _compute_prefixes(self, trees: Sequence[Tree]) -> None:
        pieces = [_stretch(row, PREFIX, tree.samples[0], 0, _shared(tree)) for row, tree in enumerate(trees)]
        given = self._laid_out(pieces)
        made = arguments_of([tree.images for tree in trees], self._tuned.family.pixels, given["input_ids"])
        given |= {name: value.to(self._tuned.device) for name, value in made.items()}
        rows, last = torch.tensor(_ends(pieces)).unbind(1)
        self._per_token = {name: given[name][rows, last, None] for name in PER_TOKEN if name in given}
        # no mask: padding stands behind, where nothing looks
        self._computed(pieces, given)

    def ask(self) -> Tensor:
        """Compute the questions behind their prefixes and begin the answers; returns the logits (Q, V)."""
        return self._grow([_stretch(b.row, b.number, b.sample, b.shared, len(b.sample.ids)) for b in self.branches])

    def go_on(self) -> Tensor:
        """Compute the last token of each open answer and take the next; returns the logits (open, V)."""
        alive = sorted({branch.row for branch in self.open})
        if len(alive) <= LEAVE * len(self._segments):
            self._keep(alive)
            for branch in self.open:
                branch.row = alive.index(branch.row)
        return self._grow([_next(branch) for branch in self.open])

    def _grow(self, pieces: Sequence[_Piece]) -> Tensor:
        """Put a piece of each open question behind its row, and take each one's next token."""
        given = self._laid_out(pieces)
        width = given["input_ids"].shape[1]
        mask = tree_mask(self._segments, last=width)
        if backend_of(self._tuned.decoder) == "eager":
            mask = additive(mask, torch.bfloat16 if self._tuned.bf16 else self._tuned.base.dtype)
        given |= {name: value.expand(-1, width, *value.shape[2:]) for name, value in self._per_token.items()}
        logits = self._computed(pieces, {"attention_mask": mask, **given}).float()
        tokens = self._penalised(logits).argmax(dim=-1).tolist()
        for branch, token in zip(self.open, tokens, strict=True):
            branch.said.append(token)
        limit, stops = self._rules.limit, self._rules.stops
        self.open = [b for b in self.open if len(b.said) < limit and b.said[-1] not in stops]
        return logits

    def _penalised(self, logits: Tensor) -> Tensor:
        """Logits with those of tokens that stand before made less (Keskar et al. 2019, arXiv 1909.05858)."""
        penalty = self._rules.penalty
        if penalty == 1:
            return logits
        there = torch.zeros_like(logits, dtype=torch.bool)
        for row, branch in zip(there, self.open, strict=True):
            row[torch.tensor([*branch.sample.ids, *branch.said], device=row.device)] = True
        return torch.where(there, torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _laid_out(self, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
        """Arguments of the forward for pieces one after the other in their rows (R, W), padded behind.

        What stands in the new columns is added to what stood in the cache's.
        """
        rows = len(self._segments)
        shape = (rows, max(1, *(column + 1 for _, column in _ends(pieces))))
        ids = torch.full(shape, self._rules.pad_id)
        segments = torch.full(shape, PADDING)
        positions = torch.zeros(self._axes, *shape, dtype=torch.long)
        extras = {name: torch.zeros(shape, dtype=torch.long) for name in self._extras}
        for piece, (row, last) in zip(pieces, _ends(pieces), strict=True):
            here = slice(last + 1 - len(piece.ids), last + 1)
            ids[row, here] = torch.tensor(piece.ids, dtype=torch.long)
            segments[row, here] = piece.segment
            positions[:, row, here] = piece.positions
            for name, values in piece.extras.items():
                extras[name][row, here] = torch.tensor(values, dtype=torch.long)
        device = self._tuned.device
        self._segments = torch.cat([self._segments, segments.to(device)], dim=1)
        placed = {"input_ids": ids, "position_ids": positions if self._axes > 1 else positions[0], **extras}
        return {name: value.to(device) for name, value in placed.items()}

    def _computed(self, pieces: Sequence[_Piece], given: Mapping[str, Any]) -> Tensor:
        """The logits (pieces, V) behind each piece's last token; the cache then has all its keys and values."""
        rows, columns = torch.tensor(_ends(pieces), device=self._tuned.device).unbind(1)
        return self._tuned.logits_at(rows, columns, past_key_values=self._cache, use_cache=True, **given)

    def _keep(self, rows: Sequence[int]) -> None:
        """Let the rows be these of the present ones, some perhaps several times."""
        count, kept = len(self._segments), torch.tensor(rows, device=self._segments.device)
        self._segments = self._segments[kept]
        self._per_token = {name: value[kept] for name, value in self._per_token.items()}
        self._cache.batch_select_indices(kept)
        for name, value in vars(self._cache).items():  # what a model keeps beside the layers
            if isinstance(value, Tensor) and value.shape[:1] == (count,):
                setattr(self._cache, name, value[kept])


def _shared(tree: Tree) -> int:
    """Tokens of a tree's prefix; of a sample alone all but the last, which predicts the answer."""
    return tree.shared or len(tree.samples[0].ids) - 1


def _stretch(row: int, segment: int, sample: Sample, start: int, end: int) -> _Piece:
    """A prompt's tokens from `start` on."""
    extras = {name: values[start:end] for name, values in sample.extras.items()}
    return _Piece(row, segment, sample.ids[start:end], positions_of(sample)[:, start:end], extras)


def _next(branch: _Branch) -> _Piece:
    """An answer's last token; positions go on behind the prompt's highest, on all axes alike."""
    sample = branch.sample
    end = len(sample.ids) if sample.positions is None else max(map(max, sample.positions)) + 1
    extras = {name: values[-1:] for name, values in sample.extras.items()}
    return _Piece(branch.row, branch.number, branch.said[-1:], torch.tensor([[end + len(branch.said) - 1]]), extras)


def _ends(pieces: Sequence[_Piece]) -> list[tuple[int, int]]:
    """Row and column of each piece's last token, where pieces of a row follow each other."""
    ends: list[tuple[int, int]] = []
    filled: dict[int, int] = {}
    for piece in pieces:
        filled[piece.row] = filled.get(piece.row, 0) + len(piece.ids)
        ends.append((piece.row, filled[piece.row] - 1))
    return ends


@torch.no_grad()
def _prove(tuned: Tuned, samples: Sequence[Sample], rules: Rules) -> Proof:
    """Hold two prompts of an image against plain rows, for which the model counts positions itself.

    The logits of their first two tokens are compared; by then prefix, questions and cache have all been used.
    """
    trees = [tree for tree in plant(samples, share=True) if tree.branched]
    chosen = max(((tree.samples[0], other) for tree in trees for other in tree.samples[1:]), key=_difference)
    grove = _Grove(tuned, plant(chosen, share=True), replace(rules, limit=3, stops=frozenset(), penalty=1.0))
    found = torch.stack([grove.ask(), grove.go_on()], dim=1).flatten(0, 1)  # (2 prompts * 2 tokens, V)
    answered = [_answered(branch.sample, branch.said) for branch in grove.branches]
    batch = collate_padded(answered, pixels=tuned.family.pixels, pad_id=rules.pad_id).to(tuned.device)
    return same_logits(tuned, found, batch)


def _difference(pair: tuple[Sample, Sample]) -> int:
    """At how many places two prompts differ; those that differ much tell most, if one should see the other."""
    return sum(a != b for a, b in zip_longest(*(sample.ids for sample in pair)))


def _answered(sample: Sample, said: Sequence[int]) -> Sample:
    """A prompt with an answer, all of whose tokens are to be predicted."""
    return replace(
        sample,
        ids=(*sample.ids, *said),
        labels=(*[IGNORED] * len(sample.ids), *said),
        extras={name: (*values, *values[-1:] * len(said)) for name, values in sample.extras.items()},
    )
