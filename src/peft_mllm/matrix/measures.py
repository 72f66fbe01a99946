"""What probes measure: losses, gradients, steps of training, logits of what was saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from peft_mllm.data.encode import Sample
from peft_mllm.evaluation import pad_token
from peft_mllm.matrix.bench import SEED, Bench, difference, logits_of, padded, samples
from peft_mllm.matrix.verdicts import Failed
from peft_mllm.models.base import Loading
from peft_mllm.tuned import Tuned, load_adapter, untouched

NEW_TOKENS = 6
Gradients = Mapping[str, Tensor | None]
"""By name of parameter; None where none arrived."""


@torch.no_grad()
def losses_of(tuned: Tuned, of: Sequence[Sample]) -> Tensor:
    """(A,) of each answer token, as padded rows."""
    torch.manual_seed(SEED)
    return tuned.answer_losses(padded(tuned, of))


def gradients_of(tuned: Tuned) -> Gradients:
    """Of everything that trains, in training mode."""
    tuned.model.train()
    tuned.model.zero_grad()
    torch.manual_seed(SEED)
    tuned.answer_losses(padded(tuned, samples(tuned.family))).mean().backward()
    return {name: parameter.grad for name, parameter in tuned.trainable().items()}


@dataclass(frozen=True)
class Answers:
    """Greedy answers.

    Attributes:
        tokens: (R, new).
        logits: (R, new, V) that chose them; 0 for tokens that were not allowed.
    """

    tokens: Tensor
    logits: Tensor

    @classmethod
    def together(cls, several: Sequence[Answers]) -> Answers:
        """The rows of all."""
        return cls(torch.cat([each.tokens for each in several]), torch.cat([each.logits for each in several]))


class _Recorder(LogitsProcessor):
    """Keeps what generation chooses from."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores)
        return scores


def answers_of(tuned: Tuned, prompts: Sequence[Sample], *, use_cache: bool = True) -> Answers:
    """Greedy answers of one length to left-padded prompts."""
    recorder = _Recorder()
    tokenizer = tuned.family.tokenizer
    tokens = tuned.generate(
        padded(tuned, prompts, left=True),
        do_sample=False,
        use_cache=use_cache,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=pad_token(tuned),
        # a random model may answer with the mark of an image, for which there is none
        suppress_tokens=sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}),
        logits_processor=LogitsProcessorList([recorder]),
    )
    return Answers(tokens, torch.stack(recorder.steps, dim=1).nan_to_num(neginf=0.0))


def flat(gradients: Gradients) -> Tensor:
    """All that arrived, one after the other."""
    return torch.cat([gradient.flatten() for gradient in gradients.values() if gradient is not None])


def train(tuned: Tuned, *, steps: int, rate: float) -> list[float]:
    """Adam on one batch; each step's loss."""
    optimizer = torch.optim.Adam(tuned.trainable().values(), lr=rate)
    batch = padded(tuned, samples(tuned.family))
    tuned.model.train()
    losses = []
    for _ in range(steps):
        torch.manual_seed(SEED)
        loss = tuned.answer_losses(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tuned.model.eval()
    return losses


def reloaded(bench: Bench, tuned: Tuned, name: str) -> Tensor:
    """The logits of what is saved, loaded as an evaluation loads it."""
    folder = bench.folder / name
    tuned.save(folder)
    if isinstance(tuned.model, PeftModel):
        return logits_of(load_adapter(bench.family(), folder))
    again = type(tuned.family).load(folder, loading=Loading("float32"))
    return logits_of(untouched(again))


def rounding_of(tuned: Tuned, measure: Callable[[Tuned], Tensor]) -> float:
    """How far a result moves when every weight is rounded once more; the model is of no more use then.

    A random model with large weights can make much of a rounding, and that is no fault of a method.
    """
    before = measure(tuned).clone()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in tuned.model.parameters():
            weight.mul_(1 + torch.randn(weight.shape, generator=generator) * torch.finfo(weight.dtype).eps)
    return difference(before, measure(tuned))


def compare(expected: Tensor, answered: Tensor, tolerance: float) -> None:
    """Raise `Failed` where logits differ by more than a part of the largest."""
    off = difference(expected, answered) if expected.shape == answered.shape else float("inf")
    if not off <= tolerance:
        raise Failed(f"logits are off by {off:.0e} of the largest")
