"""Floating-point operations of training and of an answer, from what a run counted.

Standard accounting, per weight that multiplies and per token that passes it: 2 forward, 2 for the gradient of the
activations (whether the weight is frozen or not, from the first trained part on), 2 for the gradient of the weight
where it is trained. Weights that a method adds are passed like the others.
The study's own formula (Zhou et al. 2024, arXiv 2406.05130, appendix H) is (2 P_f + 4 P_t) N_t: it leaves out the
gradient of the activations. Its answers cost 2 (P_g + layers x width x N_t), after Kaplan et al. 2020.

Left out by both, or counted as said: attention's products of queries with keys, which grow with the square of the
length and are not known from a sum of lengths (some 3 % at 700 tokens of a model of 7B); norms, activations and the
optimizer's step; the table of embeddings, from which rows are taken; recomputation by gradient checkpointing. The
head counts for every token. Tokens are those of the samples without sharing: what the method needs, not what we save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """A base in numbers of parameters.

    Attributes:
        llm: of the decoder with its table of embeddings.
        lm_head: 0 where it is the table of embeddings again.
        embeddings: of the table.
        elsewhere: of no part; taken for weights of no account.
    """

    llm: int
    lm_head: int
    connector: int
    vision: int
    elsewhere: int
    embeddings: int

    @property
    def total(self) -> int:
        """All parameters of the base."""
        return self.llm + self.lm_head + self.connector + self.vision + self.elsewhere

    @property
    def multiplied(self) -> int:
        """Weights of the language model that a token passes; a head that is the table counts once."""
        return self.llm + self.lm_head - (self.embeddings if self.lm_head else 0)


@dataclass(frozen=True)
class Passed:
    """What went through a model in training.

    Attributes:
        tokens: of all sequences, image tokens included.
        patches: positions that the vision tower computed for all images; the connector takes as many.
    """

    tokens: int
    patches: int


def training_flops(sizes: Sizes, trained: Mapping[str, int], passed: Passed, *, own: bool) -> float:
    """Of all training, by standard accounting.

    Args:
        sizes: of the base.
        trained: parameters that train, by part: llm, connector, vision.
        passed: tokens and patches of all training.
        own: whether those of the language model are its own (full fine-tuning), not added by the method.
    """
    if not any(trained.values()):
        return 0.0
    opened = {part for part, count in trained.items() if count}
    ours = trained.get("llm", 0)
    llm = _part(
        sizes.multiplied + (0 if own else ours),
        trained=min(ours, sizes.multiplied),
        backward=True,  # the loss is at its end
    )
    connector = _part(
        sizes.connector, trained=trained.get("connector", 0), backward=bool(opened & {"connector", "vision"})
    )
    vision = _part(sizes.vision, trained=trained.get("vision", 0), backward="vision" in opened)
    return float(llm * passed.tokens + (connector + vision) * passed.patches)


def _part(weights: int, *, trained: int, backward: bool) -> int:
    """Operations of one token."""
    return 2 * weights + (2 * weights if backward else 0) + 2 * trained


def paper_training_flops(frozen: int, trained: int, tokens: int) -> float:
    """The study's formula, (2 P_f + 4 P_t) N_t."""
    return float((2 * frozen + 4 * trained) * tokens)


def paper_answer_flops(weights: int, *, layers: int, width: int, tokens: int) -> float:
    """The study's formula for inference, 2 (P_g + layers x width x N_t).

    Args:
        weights: P_g, all parameters but the table of embeddings, with what the method adds.
        layers: of the decoder.
        width: of its hidden states.
        tokens: N_t.
    """
    return float(2 * (weights + layers * width * tokens))
