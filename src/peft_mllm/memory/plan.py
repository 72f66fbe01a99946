"""How a step is computed so that it fits: how many tokens at once, and what is computed again.

plan = plan_memory(tuned, trees, supply, wanted)     # nothing is computed, and no weights are needed
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any, Literal

import torch
from torch import Tensor

from peft_mllm.attention import backend_of
from peft_mllm.data.supply import Supply
from peft_mllm.data.trees import Batch, Tree
from peft_mllm.errors import SpecError
from peft_mllm.memory.standing import Standing, standing
from peft_mllm.memory.trace import trace
from peft_mllm.recompute import Recompute, mlps_of
from peft_mllm.spec import TrainSpec
from peft_mllm.tuned import Tuned

MARGIN = 0.1
"""Share of the memory that is left alone: what the libraries take, and what the allocator cannot use."""
AT_ONCE = {"cuda": 256, "cpu": 16}
"""Tokens in whose time a micro-batch could be begun: small ones waste that much each."""
EVERY = (4, 2)
"""Every so many layers, of what `auto` looks at."""
BY_WAY = 1.4
"""Time of a step whose activations go to main memory and come back, against one that keeps them; a rough guess."""
AMPLE = 0.05
"""Share of the memory below which a rough bound is enough to know that a step fits."""
PER_FEATURE, PER_PIXEL, PER_PIXEL_TRAINED = 3, 100, 2000
"""Of that bound: values kept for each input and output of a linear, and for each value of an image."""
GIB = 1024**3
TOO_LITTLE = (
    "WARNING: no way to compute a step fits into this memory by the prediction; this one takes the least. A smaller "
    "train.per_device_train_batch_size or model.quantization would take less."
)


@dataclass(frozen=True)
class Wanted:
    """What a plan is made for.

    Attributes:
        device: where it is computed.
        dtype: of the frozen weights.
        train: the options of training.
        tokens: of a micro-batch as the spec has it: no more need to be computed at once.
        several: whether a step has more than one micro-batch, so that gradients wait for the next.
        recompute: auto, or what somebody has decided.
        micro_batch_tokens: auto, a whole micro-batch even where it does not fit, or what somebody has decided.
        available: bytes for everything, weights too; None where that is not known.
        quantization: in which the decoder's linears will be held.
    """

    device: torch.device
    dtype: torch.dtype | None
    train: TrainSpec
    tokens: int
    several: bool
    recompute: Recompute = "auto"
    micro_batch_tokens: int | Literal["auto", "whole"] = "auto"
    available: int | None = None
    quantization: str = "none"


@dataclass(frozen=True)
class Row:
    """One way to compute a step.

    Attributes:
        policy: what is computed again.
        tokens: at once.
        parts: bytes by part at the peak.
        fits: whether that leaves the margin.
        time: against computing all tokens of a micro-batch at once and nothing again.
        bound: whether the parts are but bounds, and the memory so large that they do.
    """

    policy: Recompute
    tokens: int
    parts: Mapping[str, int]
    fits: bool
    time: float
    bound: bool = False

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is computed.

    Attributes:
        policy: what is computed again.
        micro_batch_tokens: at once, at most; None is no limit.
        predicted_bytes: the peak; None where it cannot be said.
        available_bytes: what there is.
        table: the ways that were looked at, the chosen one among them.
        notes: what to know of it.
    """

    policy: Recompute
    micro_batch_tokens: int | None
    predicted_bytes: int | None
    available_bytes: int | None
    table: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For result.json."""
        said = asdict(self)
        for row, each in zip(said["table"], self.table, strict=True):
            row |= {"parts": dict(each.parts), "peak": each.peak}
        return said

    def in_words(self) -> Iterator[str]:
        """A line or two."""
        chosen = next((row for row in self.table if row.policy == self.policy), None)
        if chosen is not None:
            of = f" of {gib(self.available_bytes)} that are there" if self.available_bytes else ""
            largest = sorted(chosen.parts.items(), key=lambda part: -part[1])[:3]
            parts = ", ".join(f"{name} {gib(size)}" for name, size in largest)
            less = "less than " if chosen.bound else ""
            how = f"{chosen.tokens:,} tokens at once, {said_of(self.policy)}"
            yield f"Memory: {less}{gib(chosen.peak)}{of} ({parts}); {how}."
        yield from self.notes


def gib(size: float | None) -> str:
    """Bytes for people."""
    if size is None:
        return "?"
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def said_of(policy: Recompute) -> str:
    """A policy in words."""
    if isinstance(policy, int) and policy > 1:
        return f"one layer of {policy} is computed again"
    return {
        "none": "nothing is computed again",
        "selective": "the layers' MLPs are computed again",
        "offload": "activations wait in main memory",
    }.get(str(policy), "all layers are computed again")


def plan_memory(
    tuned: Tuned, trees: Sequence[Tree], supply: Supply, wanted: Wanted, *, whole: bool = False
) -> MemoryPlan:
    """The quickest way to compute a step that fits.

    Args:
        tuned: the model, with weights or on meta.
        trees: some of the training data, as they are computed.
        supply: lays them out.
        wanted: what for.
        whole: look at every way, for a table, also when the quickest fits.
    """
    given = wanted.micro_batch_tokens if isinstance(wanted.micro_batch_tokens, int) else None
    planner = _Planner(tuned, trees, supply, wanted)
    rows: list[Row] = []
    try:
        for policy in planner.policies():
            row = planner.row(policy) if whole else planner.ample(policy) or planner.row(policy)
            rows.append(row)
            if rows[0].fits and rows[0].tokens == planner.tokens and not whole:
                break
    except Exception as error:  # a model may do anything; the plan is then to try
        why = (str(error) or type(error).__name__).splitlines()[0]
        return MemoryPlan(
            policy="none" if wanted.recompute == "auto" else wanted.recompute,
            micro_batch_tokens=given,
            predicted_bytes=None,
            available_bytes=wanted.available,
            notes=(f"How much memory a step takes cannot be said of this model: {type(error).__name__}: {why}",),
        )
    fitting = [row for row in rows if row.fits]
    chosen = min(fitting, key=lambda row: row.time) if fitting else min(rows, key=lambda row: row.peak)
    return MemoryPlan(
        policy=chosen.policy,
        micro_batch_tokens=planner.tokens if given else planner.limit(chosen),
        predicted_bytes=chosen.peak,
        available_bytes=wanted.available,
        table=tuple(rows),
        notes=() if fitting else (TOO_LITTLE,),
    )


def computed(trees: Sequence[Tree], supply: Supply) -> int:
    """Tokens that a batch of trees computes, padding included."""
    lengths = [tree.length for tree in trees]
    return sum(lengths) if supply.layout == "packed" else len(lengths) * max(lengths)


class _Planner:
    """Traces of one model, by policy and size of the batch."""

    def __init__(self, tuned: Tuned, trees: Sequence[Tree], supply: Supply, wanted: Wanted) -> None:
        self._tuned, self._supply, self._wanted = tuned, supply, wanted
        if wanted.recompute == "offload" and wanted.device.type == "cpu":
            raise SpecError("speed.recompute: offload takes activations from a GPU to main memory. Here is no GPU.")
        self._trees = sorted(trees, key=lambda tree: -tree.length)
        self._standing: Standing = standing(tuned, wanted.train, dtype=wanted.dtype, quantization=wanted.quantization)
        self._batches: dict[int, Batch] = {}
        given = wanted.micro_batch_tokens
        self.tokens = min(given, wanted.tokens) if isinstance(given, int) else wanted.tokens
        self._room = None if wanted.available is None else (1 - MARGIN) * wanted.available

    def policies(self) -> list[Recompute]:
        """What to look at, the quickest first where all fit."""
        if self._wanted.recompute != "auto":
            return [self._wanted.recompute]
        if not self._tuned.takes_padding:  # a method in PeftModel's forward may not survive that layers run twice
            return ["none"]
        base, anatomy = self._tuned.base, self._tuned.family.anatomy
        every = [k for k in EVERY if k < self._layers]
        selective = ["selective"] if mlps_of(base, anatomy) else []
        away = ["offload"] if self._wanted.device.type == "cuda" and self._tuned.shards is None else []
        return ["none", *every, *selective, "full", *away]

    def row(self, policy: Recompute) -> Row:
        """The most tokens that fit with a policy, up to those of a micro-batch; else one tree, which does not."""
        whole, parts = self._parts(policy, self.tokens)
        if self._fits(parts) or self._wanted.micro_batch_tokens != "auto":
            return self._row(policy, whole, parts)
        least, fewer = self._parts(policy, 1)
        if least >= whole or not self._fits(fewer):
            return self._row(policy, least, fewer)
        assert self._room is not None, "where nothing is known of the memory, all fits"
        # a peak is the largest of several lines: between two points it lies below the line through them
        share = (self._room - sum(fewer.values())) / (sum(parts.values()) - sum(fewer.values()))
        names = fewer.keys() | parts.keys()
        between = {name: round((1 - share) * fewer.get(name, 0) + share * parts.get(name, 0)) for name in names}
        tokens = int(least + share * (whole - least))
        return Row(policy, tokens, between, True, self._time(policy, tokens))

    def ample(self, policy: Recompute) -> Row | None:
        """A micro-batch by a rough bound, where the memory is so large that nobody needs to know better."""
        batch, stays = self._batch(self.tokens), self._standing
        decoder, layers = self._tuned.decoder, self._tuned.base.get_submodule(self._tuned.family.anatomy.layers)
        shapes = [p.shape for name, p in layers.named_parameters() if p.ndim > 1]
        rows, columns = batch.input_ids.shape
        scores = 0 if batch.packing is not None else 3 * rows * columns**2 * self._layers
        if backend_of(decoder) == "eager":
            scores = 3 * rows * columns**2 * self._layers * decoder.config.num_attention_heads
        seen = any(p.requires_grad for name in self._tuned.family.anatomy.vision for p in self._of(name))
        pixels = sum(value.numel() for value in batch.pixels.values()) * (PER_PIXEL_TRAINED if seen else PER_PIXEL)
        logits = 4 * batch.answer_tokens * self._tuned.base.get_input_embeddings().weight.shape[0]
        hidden = rows * columns * PER_FEATURE * sum(map(sum, shapes))
        parts = {
            "weights": stays.weights,
            "optimizer": stays.optimizer,
            "gradients": stays.gradients + stays.update,
            "activations": 4 * (hidden + scores),
            "logits": 4 * logits,
            "vision": 4 * pixels,
        }
        small = self._room is not None and sum(parts.values()) < AMPLE * self._room
        fixed = policy if policy != "auto" else "none"
        return Row(fixed, self.tokens, parts, True, self._time(fixed, self.tokens), bound=True) if small else None

    def _of(self, module: str) -> list[Tensor]:
        return list(self._tuned.base.get_submodule(module).parameters())

    def limit(self, row: Row) -> int | None:
        """Tokens at once: the row's; and where all of a micro-batch fit, as many as certainly do; None is no limit."""
        if self._room is None or self._wanted.micro_batch_tokens == "whole":
            return None
        stays = self._standing.weights + self._standing.optimizer
        if row.tokens < self.tokens or row.peak <= stays:
            return row.tokens
        return max(row.tokens, int(row.tokens * (self._room - stays) / (row.peak - stays)))

    def _row(self, policy: Recompute, tokens: int, parts: Mapping[str, int]) -> Row:
        return Row(policy, tokens, parts, self._fits(parts), self._time(policy, tokens))

    def _fits(self, parts: Mapping[str, int]) -> bool:
        return self._room is None or sum(parts.values()) <= self._room

    def _parts(self, policy: Recompute, tokens: int) -> tuple[int, dict[str, int]]:
        """Tokens of a batch of about so many, and bytes by part at the peak of its step."""
        batch, wanted, stays = self._batch(tokens), self._wanted, self._standing
        traced = trace(
            self._tuned,
            batch,
            policy=policy,
            device=wanted.device,
            dtype=wanted.dtype,
            accumulating=wanted.several or batch.input_ids.numel() < wanted.tokens,
        )
        always = {"weights": stays.weights, "optimizer": stays.optimizer}
        computing = always | dict(traced.parts)
        if self._tuned.shards:  # a trace knows nothing of pieces
            computing["gradients"] = min(computing.get("gradients", 0), stays.gradients)
        updating = always | {"gradients": stays.gradients, "update": stays.update}
        return traced.tokens, max(computing, updating, key=lambda parts: sum(parts.values()))

    def _batch(self, tokens: int) -> Batch:
        """As many trees as have so many tokens, the largest first; at least one."""
        if tokens not in self._batches:
            some: list[Tree] = []
            for tree in cycle(self._trees):
                some.append(tree)
                if computed(some, self._supply) >= tokens:
                    break
            self._batches[tokens] = self._supply.lay(some)
        return self._batches[tokens]

    @property
    def _layers(self) -> int:
        return len(list(self._tuned.base.get_submodule(self._tuned.family.anatomy.layers).children()))

    def _time(self, policy: Recompute, tokens: int) -> float:
        waste = AT_ONCE.get(self._wanted.device.type, AT_ONCE["cpu"])
        begun = (1 + waste / tokens) / (1 + waste / max(self.tokens, tokens))
        return begun * (BY_WAY if policy == "offload" else 1 + self._forward_share * self._again(policy))

    def _again(self, policy: Recompute) -> float:
        """Share of the forward pass that a policy computes again."""
        if isinstance(policy, int):
            return math.ceil(self._layers / policy) / self._layers
        if policy != "selective":
            return float(policy == "full")
        base, anatomy = self._tuned.base, self._tuned.family.anatomy
        inside = sum(p.numel() for module in mlps_of(base, anatomy) for p in module.parameters())
        return inside / sum(p.numel() for p in base.get_submodule(anatomy.layers).parameters())

    @property
    def _forward_share(self) -> float:
        """Of a step: half where weights are frozen, a third where they have gradients of their own."""
        trained = sum(p.numel() for p in self._tuned.decoder.parameters() if p.requires_grad)
        return 1 / 3 if trained > sum(p.numel() for p in self._tuned.decoder.parameters()) / 2 else 1 / 2
