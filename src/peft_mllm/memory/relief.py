"""Out of memory in a step: once, the same step is computed in smaller parts, and so are all steps after it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_mllm.data.trees import Batch
from peft_mllm.errors import OutOfMemory
from peft_mllm.recompute import Recompute

SAYS_SO = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
"""In the messages of torch's RuntimeErrors where a device or the CPU has no more; in lower case."""
REMEDY = (
    "Lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps by as much (the result stays "
    "the same), set speed.micro_batch_tokens or speed.recompute: full, or hold the base in model.quantization: 4bit."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAYS_SO)


@dataclass
class Relief:
    """What a training does when a step does not fit.

    Attributes:
        relay: sample indices, and a limit of tokens, to batches.
        recompute: switches to another policy.
        note: is told what happened.
        policy: what is computed again so far.
        again: a step may be computed again; no process can do that alone where weights lie in pieces.
        whole: leave batches as they are, and compute layers again instead, which changes no bit.
        limit: tokens at once from now on; None as the batches come.
        happened: whether memory ran out before.
    """

    relay: Callable[[Sequence[int], int], list[Batch]]
    recompute: Callable[[Recompute], None]
    note: Callable[[str], None]
    policy: Recompute = "none"
    again: bool = True
    whole: bool = False
    limit: int | None = field(default=None, init=False)
    happened: bool = field(default=False, init=False)

    def compute(
        self,
        gradients: Callable[[Sequence[Batch]], list[Tensor]],
        batches: Sequence[Batch],
        samples: Callable[[], Sequence[Sequence[int]]],
        drop: Callable[[], None],
    ) -> tuple[Sequence[Batch], list[Tensor]]:
        """The gradients of a step's batches, in smaller parts where memory runs out.

        Args:
            gradients: batches to their losses, gradients added to the parameters'.
            batches: of the step.
            samples: the indices of the samples in each of the step's micro-batches.
            drop: lets go of the gradients so far.

        Returns:
            the batches as they were computed, and their losses.

        Raises:
            OutOfMemory: it happened before.
        """
        batches = self._within(batches, samples)
        try:
            return batches, gradients(batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = (str(error) or "out of memory").splitlines()[0].rstrip(".")
        # only here, where the error is gone, and with it the tensors that its frames hold
        drop()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.happened or not self.again:
            nor = ", nor was there for smaller parts" if self.happened else ""
            raise OutOfMemory(f"There is not enough memory for a step{nor}: {why}. {REMEDY}")
        self.happened = True
        remedy = self._smaller(batches)
        self.note(f"WARNING: out of memory ({why}). {remedy}")
        return self.compute(gradients, batches, samples, drop)

    def _smaller(self, batches: Sequence[Batch]) -> str:
        """Take half as much at once; or compute all layers again, where one sample is all there is."""
        largest = max(batches, key=_tokens)
        if self.whole or len(largest.sample_ids) == 1:
            self.recompute("full")
            self.policy = "full"
            return "From here on every layer is computed again in the backward pass, beginning with this step."
        self.limit = _tokens(largest) // 2
        return (
            f"From here on {self.limit:,} tokens are computed at once, beginning with this step. Without dropout the "
            "result changes by rounding alone."
        )

    def _within(self, batches: Sequence[Batch], samples: Callable[[], Sequence[Sequence[int]]]) -> Sequence[Batch]:
        limit = self.limit
        if limit is None or max(map(_tokens, batches), default=0) <= limit:
            return batches
        return [batch for indices in samples() for batch in self.relay(indices, limit)]


def _tokens(batch: Batch) -> int:
    """Computed, padding included."""
    return batch.input_ids.numel()
