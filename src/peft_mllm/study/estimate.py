"""What a study will cost, before anything starts: parameters and FLOPs are counted, memory, time and disk estimated.

Parameters come from the model without its weights, tokens from encoding a few samples of each task, FLOPs from both
(flops.py). Memory is what the memory plan says of a step that is computed at once (memory/asked.py): following a model
takes seconds, so it is done once for each kind of run, with the task of the longest samples. Time is taken from
finished runs of the study where there are some; before, from how fast this machine multiplies matrices. Needs torch,
and imports it when called.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import DataError, ModelError
from peft_mllm.methods import METHODS
from peft_mllm.record import Record
from peft_mllm.spec import ModelSpec, NamedSpec, Spec
from peft_mllm.specfile import build
from peft_mllm.study.flops import Passed, Sizes, training_flops
from peft_mllm.study.ledger import trains_own
from peft_mllm.study.plan import Run
from peft_mllm.study.results import Result
from peft_mllm.tasks import TASKS

if TYPE_CHECKING:
    from peft_mllm.bare import BareModel

SAMPLES = 24
"""Encoded of each task to know its mean length."""
HELD = 256
"""Records of each task that stand for all where memory is planned."""
UTILISATION = 0.3
"""Share of the matrix multiplication's speed that training reaches, where nothing has been measured yet."""
PER_STEP = 0.06
"""Seconds of a step that are not multiplication, where nothing has been measured yet."""
PER_RUN = 4.0
"""Seconds of loading a model and of writing, likewise."""
PER_QUESTION = 0.004
"""Seconds of a short answer, likewise, beside its multiplications."""
ANSWERS = 5.0
"""Seconds within which the hub has to answer."""
RESULT_BYTES = 300
"""Of a question's line in the predictions."""


@dataclass(frozen=True)
class Estimate:
    """What one run will cost; None where it cannot be said.

    Attributes:
        trainable: parameters that train, by count.
        flops: of training, by standard accounting.
        memory: peak bytes, of the longest samples that such a run has in the study.
        seconds: of the whole run.
        disk: bytes that stay.
    """

    trainable: int
    flops: float | None
    memory: float | None
    seconds: float | None
    disk: float


@dataclass(frozen=True)
class Forecast:
    """The estimates of all runs of a study.

    Attributes:
        runs: by the run's id.
        measured: on how many finished runs the times rest; 0 is a rough guess.
        unknown: data that could not be read, with the reason.
    """

    runs: Mapping[str, Estimate]
    measured: int
    unknown: Mapping[str, str]


@dataclass(frozen=True)
class _Data:
    """One split of a task: how many records, their mean tokens and images, and the first of them."""

    records: int
    tokens: float
    images: float
    first: Sequence[Record] = field(default=(), compare=False, repr=False)


def forecast(runs: Iterable[Run], finished: Sequence[Result]) -> Forecast:
    """Estimate every run.

    Args:
        runs: of a plan.
        finished: results of this study, or of another with the same models on the same machine.

    Raises:
        ModelError: there is no such model.
        MethodError: a method cannot work on it.
    """
    book, planned = _Book(finished), list(runs)
    peaks = book.peaks([run.spec for run in planned])
    estimates = {run.id: book.estimate(run.spec, peaks[_kind(run.spec)]) for run in planned}
    return Forecast(estimates, book.measured, book.unknown)


def refuse_what_cannot_be_had(models: Iterable[ModelSpec], remedy: str) -> None:
    """Ask whether the hub answers, where a model is to come from there: without an answer, loading tries for long.

    Args:
        models: of a study.
        remedy: how a local directory is named instead.

    Raises:
        ModelError: it does not answer; names the model.
    """
    from huggingface_hub import constants, get_session

    remote = [path for model in models for path in (model.path, model.vision_tower) if path and _is_remote(path)]
    if not remote or constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWERS)
    except Exception as error:  # whatever keeps it from answering: no name, no route, no certificate, no time
        raise ModelError(
            f"{remote[0]} is no local directory, and the hub ({constants.ENDPOINT}) cannot be reached: {error}. Name a "
            f"local directory: {remedy}. If it was downloaded before, set HF_HUB_OFFLINE=1."
        ) from error


def _is_remote(path: str) -> bool:
    return path != "embedded" and not path.startswith(("tiny:", "/", ".", "~")) and not Path(path).exists()


class _Book:
    """What is looked up once for many runs."""

    def __init__(self, finished: Sequence[Result]) -> None:
        self._bare: dict[str, BareModel] = {}
        self._trained: dict[str, dict[str, int]] = {}
        self._data: dict[str, _Data | None] = {}
        self.unknown: dict[str, str] = {}
        trained = [result for result in finished if result.training and result.training.sequence_tokens]
        self.measured = len(trained)
        # seconds for a token and for a question, by model and method, then by model
        self._per_token = _medians(
            (_keys(result), result.training.seconds / result.training.sequence_tokens)
            for result in trained
            if result.training
        )
        self._per_question = _medians(
            (_keys(result), score.seconds / score.n)
            for result in finished
            for score in result.scores.values()
            if score.n
        )

    def peaks(self, specs: Iterable[Spec]) -> dict[str, int | None]:
        """The memory of each kind of run; None where no data of it can be read, or its model cannot be followed."""
        from peft_mllm.memory.asked import peak_of

        longest: dict[str, tuple[float, Spec, _Data | None]] = {}
        for spec in specs:
            data = self._training(spec)
            tokens = data.tokens if data else -1.0
            if tokens > longest.get(_kind(spec), (-2.0,))[0]:
                longest[_kind(spec)] = tokens, spec, data
        return {
            # one more than a micro-batch, so that there may be a second
            kind: peak_of(spec, self._model(spec.model), data.first[: spec.train.per_device_train_batch_size + 1])
            if data
            else None
            for kind, (_, spec, data) in longest.items()
        }

    def _training(self, spec: Spec) -> _Data | None:
        """What it trains on; None where that cannot be read."""
        return self._split(spec, spec.task, "train") if self._trained_of(spec) else _Data(0, 0.0, 0.0)

    def estimate(self, spec: Spec, memory: int | None) -> Estimate:
        """One run, with its memory."""
        bare, trained = self._model(spec.model), self._trained_of(spec)
        total = sum(trained.values())
        data = self._training(spec)
        asked = [self._split(spec, task, spec.scored) for task in (spec.task, *spec.evaluate)]
        questions = sum(each.records for each in asked if each)
        disk = 4.0 * total + RESULT_BYTES * questions
        if data is None:
            return Estimate(total, None, memory, None, disk)
        steps = _steps(spec, data)
        samples = steps * _batch(spec)
        sizes = bare.sizes()
        parts = Sizes(**sizes["parts"], embeddings=sizes["embeddings"])
        passed = Passed(round(samples * data.tokens), round(samples * data.images * _patches(bare)))
        flops = training_flops(parts, trained, passed, own=trains_own(spec.method.name))
        return Estimate(total, flops, memory, self._seconds(spec, flops, passed.tokens, steps, questions), disk)

    def _seconds(self, spec: Spec, flops: float, tokens: int, steps: int, questions: int) -> float:
        keys = ((spec.model.path, spec.method.name), (spec.model.path, ""))
        per_token = next((self._per_token[key] for key in keys if key in self._per_token), None)
        per_question = next((self._per_question[key] for key in keys if key in self._per_question), PER_QUESTION)
        training = tokens * per_token if per_token is not None else flops / _speed() + steps * PER_STEP
        return PER_RUN + training + questions * per_question

    def _model(self, spec: ModelSpec) -> BareModel:
        from peft_mllm.memory.asked import bare_model

        key = spec.model_dump_json()
        if key not in self._bare:
            self._bare[key] = bare_model(spec)
        return self._bare[key]

    def _trained_of(self, spec: Spec) -> dict[str, int]:
        key = spec.model_dump_json(include={"model", "method", "connector", "vision"})
        if key not in self._trained:
            opened = {"connector": spec.connector != "frozen", "vision": spec.vision == "tuned"}
            trains = spec.method.name != "none" or any(opened.values())
            method = build(METHODS, spec.method)
            self._trained[key] = self._model(spec.model).trained(method, **opened) if trains else {}
        return self._trained[key]

    def _split(self, spec: Spec, task: NamedSpec, split: str) -> _Data | None:
        """A split's size; None where its data cannot be read."""
        key = f"{spec.model.path} {task.model_dump_json()} {split}"
        if key not in self._data:
            try:
                self._data[key] = _measured(self._model(spec.model), task, split)
            except DataError as error:
                self._data[key] = None
                self.unknown.setdefault(task.name, str(error).splitlines()[0])
        data = self._data[key]
        limit = spec.data.max_train_samples if split == "train" else spec.data.max_eval_samples
        return data and replace(data, records=min(data.records, limit or data.records))


def _measured(bare: BareModel, named: NamedSpec, split: Any) -> _Data:
    task = build(TASKS, named)
    if not task.has(split):
        return _Data(0, 0.0, 0.0)
    records = task.records(split)
    chosen = [records[i] for i in range(0, len(records), max(1, len(records) // SAMPLES))]
    lengths = [len(bare.family.encode(record).ids) for record in chosen]
    images = [len(record.images) for record in chosen]
    first = [records[i] for i in range(min(HELD, len(records)))]
    return _Data(len(records), _mean(lengths), _mean(images), first)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _batch(spec: Spec) -> int:
    return spec.train.per_device_train_batch_size * spec.train.gradient_accumulation_steps


def _steps(spec: Spec, data: _Data) -> int:
    """Of all epochs, or as many as the spec says; a last step of an epoch may be smaller."""
    if not data.records:
        return 0
    kept = data.records * (1 - spec.data.validation_fraction)
    return spec.train.max_steps if spec.train.max_steps > 0 else _epochs(spec, math.ceil(kept / _batch(spec)))


def _epochs(spec: Spec, steps_per_epoch: int) -> int:
    return math.ceil(spec.train.num_train_epochs * steps_per_epoch)


def _patches(bare: BareModel) -> int:
    """Positions that the tower computes for an image, where its config says."""
    config = getattr(bare.family.model.config, "vision_config", None)
    size, patch = getattr(config, "image_size", 0), getattr(config, "patch_size", 0)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) and patch else 0


def _kind(spec: Spec) -> str:
    """Equal for runs whose steps take the same memory, but for the length of their samples."""
    decides: dict[str, Any] = {
        **dict.fromkeys(("model", "method", "connector", "vision", "speed"), True),
        "data": {"share_prefix", "labels"},
        "train": {"per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "optim", "optim_args"},
    }
    return spec.model_dump_json(include=decides)


@cache
def _speed() -> float:
    """FLOPs in a second that training may reach here, from one multiplication of matrices."""
    import torch

    on_gpu = torch.accelerator.is_available()
    device, dtype, size = ("cuda", torch.bfloat16, 8192) if on_gpu else ("cpu", torch.float32, 1024)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    (matrix @ matrix).sum().item()  # the first one warms up; .item() waits for the device
    began = time.perf_counter()
    for _ in range(3):
        (matrix @ matrix).sum().item()
    return UTILISATION * 3 * 2 * size**3 / (time.perf_counter() - began)


def _keys(result: Result) -> tuple[tuple[str, str], ...]:
    return (result.model.source, result.method.name), (result.model.source, "")


def _medians(pairs: Iterable[tuple[tuple[tuple[str, str], ...], float]]) -> dict[tuple[str, str], float]:
    """The median of what was measured, for a model's method and for the model."""
    gathered: dict[tuple[str, str], list[float]] = {}
    for keys, value in pairs:
        for key in keys:
            gathered.setdefault(key, []).append(value)
    return {key: median(values) for key, values in gathered.items()}
