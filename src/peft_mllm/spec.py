"""What a run is: typed, frozen, and equal specs are equal runs. Knows no shelf; reading files is specfile.py's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

Tuning = Literal["frozen", "tuned"]
ConnectorTuning = Literal["frozen", "tuned", "released"]
Scored = Literal["test", "validation"]
Strategy = Literal["no", "steps", "epoch"]


class Frozen(BaseModel):
    """A value: cannot be changed, refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelSpec(Frozen):
    """Which base model, and how it is held in memory."""

    path: str = "embedded"
    """`embedded`, a local directory, a hub id, or `tiny:FAMILY` for a random member of a family."""
    family: str | None = None
    """Name on the models shelf; found from the model's config when left out."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; `auto` is bfloat16 on a GPU and float32 elsewhere."""
    attn_implementation: str = "sdpa"
    """transformers' name of the attention backend."""
    vision_tower: str | None = None
    """Directory or hub id of the vision tower, for a checkpoint without its own; None is what its config names."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the language model's linears in 8 or 4 bits (bitsandbytes); connector and tower stay as they are."""
    anatomy: Mapping[str, Any] | None = None
    """Parts of a model that the family `generic` would find wrong or not at all: `{connector: [model.projector]}`."""


class NamedSpec(Frozen):
    """A name on a shelf with options that only the class of that name understands."""

    name: str
    options: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_short_forms(cls, value: Any) -> Any:
        """Accept `lora` and `{name: lora, rank: 8}`, the two forms people write."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "options" not in value:
            return {
                "name": value.get("name"),
                "options": {key: option for key, option in value.items() if key != "name"},
            }
        return value


class DataSpec(Frozen):
    """How records become batches."""

    max_length: int = Field(default=2048, ge=8)
    """Tokens of a sample, image tokens included; a longer one is a finding of the data check."""
    max_train_samples: int | None = Field(default=None, ge=1)
    """Use only so many of the training split; None is all."""
    subset: Literal["first", "random"] = "first"
    """Which these are: the first, or a draw by seed and record id, in which the smaller one lies in the larger."""
    max_eval_samples: int | None = Field(default=None, ge=1)
    """Score only the first of each evaluated split; None is all."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Hold out this share of the training split for validation, where the task has no validation split."""
    labels: Literal["answer", "upstream"] = "answer"
    """What is learned: the answers, or all that the model's authors supervised (Qwen-VL: turn markers too)."""
    share_prefix: bool = True
    """Samples with one image are branches of one tree: the image is computed once, gradients stay equal."""
    group_by_image: bool | Literal["auto"] = "auto"
    """Keep the samples of one image together, so that it is computed once; false shuffles samples one by one. `auto`
    keeps them where the training data has 1.5 samples to an image or more."""


class GenerationSpec(Frozen):
    """How answers are got, with the names of transformers' GenerationConfig."""

    do_sample: bool = False
    """Greedy when false."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    num_beams: int = Field(default=1, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    """None is the task's own limit."""
    choices: Literal["generate", "likelihood", "likelihood_sum", "likelihood_chars"] = "generate"
    """How multiple choice is answered: in words, or by the choice of the lowest cross-entropy (mean of its tokens as
    in Qwen-VL's evaluation, sum, or per character)."""


class RetentionSpec(Frozen):
    """What is measured before and after training, to say what was forgotten."""

    text: bool = True
    """The loss on a short English text that comes with the package."""
    samples: int = Field(default=32, ge=0)
    """The loss on so many reference answers of each task in `evaluate`; 0 measures none."""


class CurveSpec(Frozen):
    """Checkpoints of the training that are scored like its end, to see what longer training does."""

    after_best: int = Field(default=0, ge=0)
    """Score at the evaluation of lowest validation loss, and at so many evaluations after it; 0 is neither."""
    epochs: tuple[float, ...] = ()
    """Score at the evaluations nearest to these epochs."""

    @field_validator("epochs")
    @classmethod
    def _in_order(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(epoch <= 0 for epoch in value):
            raise ValueError("an epoch to score at is greater than 0")
        return tuple(sorted(set(value)))

    @property
    def wanted(self) -> bool:
        """Whether there is anything to score."""
        return bool(self.after_best or self.epochs)


class TrainSpec(Frozen):
    """Training, with the names of HF TrainingArguments."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Of the method's parameters; None is the method's own default (the paper's)."""
    connector_learning_rate: float = Field(default=2e-5, gt=0)
    """Of the connector, where it is tuned."""
    vision_learning_rate: float = Field(default=2e-5, gt=0)
    """Of the vision tower, where it is tuned."""
    num_train_epochs: float = Field(default=3.0, gt=0)
    """Times that every sample is seen."""
    max_steps: int = Field(default=-1, ge=-1)
    """When positive, this many steps whatever the epochs."""
    per_device_train_batch_size: int = Field(default=16, ge=1)
    """Questions in a micro-batch (not images)."""
    per_device_eval_batch_size: int = Field(default=32, ge=1)
    """Questions asked, or validated, at once."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches of a step, in each process."""
    optim: str = "AdamW"
    """Class name in torch.optim."""
    optim_args: Mapping[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of that class."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients, for optimizers that have it."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients, for optimizers that have it."""
    adam_epsilon: float = 1e-8
    """Added to the denominator, for optimizers that have it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On matrices; vectors (norms, biases, scales) never decay."""
    lr_scheduler_type: str = "cosine"
    """A name of transformers' schedules."""
    lr_scheduler_kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Further arguments of that schedule."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of all steps in which the rate rises."""
    warmup_steps: int = Field(default=0, ge=0)
    """When positive, takes the place of the ratio."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 is no clipping."""
    bf16: bool = False
    """Compute in bfloat16 by autocast; trained parameters stay float32."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    eval_strategy: Strategy = "epoch"
    """When the validation loss is measured; with steps or epoch also at the end."""
    eval_steps: int = Field(default=100, ge=1)
    """With eval_strategy: steps."""
    save_strategy: Strategy = "epoch"
    """When a checkpoint is saved; the last step and the best always are."""
    save_steps: int = Field(default=100, ge=1)
    """With save_strategy: steps."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept, beside the best."""
    load_best_model_at_end: bool = True
    """End with the weights of the lowest validation loss, where there is a validation split."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a lower validation loss."""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """Processes that prepare steps ahead; 0 prepares each step when it is needed."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers beside metrics.jsonl, which is always written."""

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps train nothing; leave it out, or use the method none")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class SpeedSpec(Frozen):
    """How a run is computed. Nothing here changes what comes out, but for rounding: a run's identity has none of it.

    One exception: where memory makes a micro-batch be computed in parts, and the method has dropout, each part draws
    its own. What was done stands in result.json under `plan`.
    """

    attention: Literal["auto", "mask"] = "auto"
    """`auto` computes trees without a mask where the model allows it; `mask` always by a four-dimensional mask."""
    lean: Literal["auto", "off"] = "auto"
    """`auto` computes the decoder's layers by functions that save half as much, and its last layer where answers are,
    for architectures that are known and proven exact at the start; `off` never."""
    compile: bool = False
    """Let torch.compile fuse the elementwise work of those functions: for a GPU, after half a minute of compiling."""
    recompute: Literal["auto", "none", "selective", "full", "offload"] | PositiveInt = "auto"
    """What of the decoder is computed again in the backward pass, to save memory: nothing, the layers' MLPs
    (`selective`), all layers (`full`), or one layer of so many (a number); with `offload` it waits in main memory.
    `auto` is the quickest that fits."""
    micro_batch_tokens: Literal["auto"] | PositiveInt = "auto"
    """Tokens computed at once, at most, padding included; `auto` is what fits, up to a whole micro-batch."""
    vision_cache: str | None = None
    """Directory for what a frozen vision tower makes of each image, shared by runs; None keeps nothing, but in a study,
    whose runs share one in its folder."""
    vision_cache_gb: float = Field(default=50.0, ge=0)
    """Gigabytes that this directory may hold, where what was not used for longest makes room; 0 keeps nothing."""
    shard: Literal["auto", "none", "fsdp", "zero3"] = "auto"
    """How several processes hold the base: whole, each of them (`none`), or a piece each, cut by torch's FSDP2 (`fsdp`)
    or DeepSpeed (`zero3`). `auto` does what `accelerate launch` was told."""
    deterministic: Literal["off", "world-size"] = "off"
    """`world-size` gives the same adapter, bit for bit, however many processes share a step's micro-batches: their
    gradients are added in one order."""

    @model_validator(mode="after")
    def _the_same_kernels(self) -> SpeedSpec:
        if self.deterministic == "world-size" and self.compile:
            raise ValueError(
                "speed.deterministic: world-size cannot hold with speed.compile: what is compiled depends on the "
                "batches that a process has seen. Leave one of them out"
            )
        return self

    @property
    def tokens_at_once(self) -> int | Literal["auto", "whole"]:
        """Where bits count, what is free on a machine must not say where a micro-batch is cut."""
        free_to_cut = self.deterministic == "off" or self.micro_batch_tokens != "auto"
        return self.micro_batch_tokens if free_to_cut else "whole"


class Spec(Frozen):
    """One run: base model, method, parts, task, training, and what to evaluate."""

    model: ModelSpec = Field(default_factory=ModelSpec)
    method: NamedSpec
    connector: ConnectorTuning = "frozen"
    """`released` opens what the study's released code calls the connector: for Qwen-VL embeddings and head."""
    vision: Tuning = "frozen"
    task: NamedSpec
    evaluate: tuple[NamedSpec, ...] = ()
    """Tasks to score after training, beside the task itself."""
    scored: Scored = "test"
    """Which split is scored; with `validation`, no test split is opened at all."""
    data: DataSpec = Field(default_factory=DataSpec)
    generation: GenerationSpec = Field(default_factory=GenerationSpec)
    retention: RetentionSpec = Field(default_factory=RetentionSpec)
    curve: CurveSpec = Field(default_factory=CurveSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    speed: SpeedSpec = Field(default_factory=SpeedSpec)
    seed: int = Field(default=42, ge=0)
    output_dir: str
    name: str | None = None
    """Shown in tables; the method's name when left out."""

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _each_task_once(self) -> Spec:
        names = [self.task.name, *(task.name for task in self.evaluate)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} would be scored twice (the task itself always is)")
        return self

    @model_validator(mode="after")
    def _a_tower_that_stays(self) -> Spec:
        if self.speed.vision_cache is not None and self.vision == "tuned":
            raise ValueError(
                "speed.vision_cache keeps what a frozen vision tower makes of images, and vision is tuned: what it "
                "makes changes with every step. Leave speed.vision_cache out"
            )
        return self

    @model_validator(mode="after")
    def _a_curve_that_there_can_be(self) -> Spec:
        curve, train = self.curve, self.train
        if not curve.wanted:
            return self
        if train.eval_strategy == "no":
            raise ValueError("curve needs evaluations, and train.eval_strategy is no; set it to epoch or steps")
        if train.early_stopping_patience is not None and train.early_stopping_patience < curve.after_best:
            raise ValueError(
                f"curve.after_best {curve.after_best} is never reached, since train.early_stopping_patience stops "
                f"after {train.early_stopping_patience}; raise it, or leave it out"
            )
        if train.max_steps < 0 and curve.epochs and curve.epochs[-1] > train.num_train_epochs:
            raise ValueError(
                f"curve.epochs has {curve.epochs[-1]:g}, and train.num_train_epochs is {train.num_train_epochs:g}; "
                "raise it, or leave the epoch out"
            )
        return self

    @property
    def title(self) -> str:
        """What tables call this run."""
        return self.name or self.method.name

    def outcome(self) -> dict[str, Any]:
        """The spec as JSON data, without what does not change the result."""
        return self.model_dump(
            mode="json",
            exclude={
                "output_dir": True,
                "name": True,
                "speed": True,
                "train": {"report_to", "logging_steps", "dataloader_num_workers"},
            },
        )

    @property
    def id(self) -> str:
        """Equal for equal outcomes: a hash of what decides the result."""
        return hashlib.sha256(json.dumps(self.outcome(), sort_keys=True).encode()).hexdigest()[:16]
