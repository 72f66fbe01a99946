"""The memory plan of a spec before it runs: from the model's config, the method and the first of the data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peft_mllm.bare import BareModel
from peft_mllm.data.plan import Plan
from peft_mllm.data.supply import Supply
from peft_mllm.errors import SpecError
from peft_mllm.evaluation import pad_token
from peft_mllm.exactness import layouts
from peft_mllm.lean import install
from peft_mllm.loading import dtype_for
from peft_mllm.memory.free import free_bytes
from peft_mllm.memory.plan import MemoryPlan
from peft_mllm.memory.prepare import plan_run
from peft_mllm.memory.standing import standing
from peft_mllm.methods import METHODS
from peft_mllm.record import Record
from peft_mllm.spec import ModelSpec, Spec
from peft_mllm.specfile import build
from peft_mllm.tasks import TASKS
from peft_mllm.tuned import Tuned


def plan_of(spec: Spec, *, available: int | None = None) -> MemoryPlan:
    """How the steps of a spec would be computed here; no weights are loaded.

    The samples are the first of the training data as the task gives them, and taken to be laid out in the quickest way
    that the model allows: the run itself proves that it is exact.

    Args:
        spec: of the run.
        available: bytes that there are; what is free here if left out.

    Raises:
        SpecError: it trains nothing.
        ModelError: there is no such model.
        MethodError: the method cannot work on it.
        DataError: the training data cannot be read.
    """
    asked = _Asked.of(spec, bare_model(spec.model))
    if not asked.trains:
        raise SpecError("This spec trains nothing, and scoring takes little more memory than the weights.")
    free = free_bytes(asked.device) if available is None else available
    return asked.plan(build(TASKS, spec.task).records("train"), available=free, whole=True)


def peak_of(spec: Spec, bare: BareModel, records: Sequence[Record]) -> int | None:
    """Bytes at the peak of a spec's steps if nothing is computed in parts, or of its weights where nothing trains.

    Args:
        spec: of the run.
        bare: its `bare_model`.
        records: training data, some of it.

    Returns:
        None where the model cannot be followed.

    Raises:
        MethodError: the method cannot work on the model.
    """
    asked = _Asked.of(spec, bare)
    if asked.trains and records:
        return asked.plan(records, available=None, whole=False).predicted_bytes
    return standing(asked.tuned, spec.train, dtype=asked.dtype, quantization=spec.model.quantization).weights


def bare_model(spec: ModelSpec) -> BareModel:
    """A model as it is planned for: in full precision, since nothing can be quantised that has no numbers.

    Raises:
        ModelError: there is no such model.
    """
    return BareModel.of(spec.model_copy(update={"quantization": "none"}))


@dataclass(frozen=True)
class _Asked:
    """A spec's model with its method, on meta; `trains` says whether any of it does."""

    spec: Spec
    tuned: Tuned
    trains: bool
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, spec: Spec, bare: BareModel) -> _Asked:
        method = build(METHODS, spec.method)
        opened = {"connector": spec.connector != "frozen", "vision": spec.vision == "tuned"}
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        dtype = dtype_for(spec.model.dtype, device)
        if spec.connector == "released":
            bare = copy.copy(bare)
            bare.family = copy.copy(bare.family)
            bare.family.anatomy = bare.family.anatomy.released()
        tuned = bare.attached(method, **opened, bf16=spec.train.bf16 or dtype == "bfloat16")
        if spec.speed.lean == "auto":
            install(tuned.base, tuned.family.anatomy)
        return cls(spec, tuned, method.tunes_llm or any(opened.values()), device, getattr(torch, dtype))

    def plan(self, records: Sequence[Record], *, available: int | None, whole: bool) -> MemoryPlan:
        spec, tuned = self.spec, self.tuned
        count = min(len(records), spec.data.max_train_samples or len(records))
        supply = Supply(
            records=records,
            encode=lambda record: tuned.family.encode(record, labels=spec.data.labels),
            pixels=tuned.family.pixels,
            pad_id=pad_token(tuned),
            layout=layouts(tuned, spec)[0],
            share=spec.data.share_prefix,
        )
        size = spec.train.per_device_train_batch_size
        accumulated = spec.train.gradient_accumulation_steps if count > size else 1
        order = _InOrder(size=count, micro_batch=size, micro_batches=accumulated, seed=spec.seed)
        return plan_run(
            tuned,
            supply,
            order,
            spec,
            device=self.device,
            dtype=self.dtype,
            available=available,
            whole=whole,
            quantization=spec.model.quantization,
        )


class _InOrder(Plan):
    """The data as it comes: questions about one image mostly stand together."""

    def order(self, epoch: int) -> list[int]:
        """All samples, from the first."""
        return list(range(self.size))
