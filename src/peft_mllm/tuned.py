"""A base model made trainable: method attached, parts opened, ready to train, ask, save and load.

tuned = attach(family, method, connector=True, vision=False)
logits = tuned.answer_logits(batch)        # (A, V)
tuned.save(directory)                      # a PEFT directory, or a whole model where there is no PEFT method
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_mllm.anatomy import PARTS, Part
from peft_mllm.attention import (
    TREE_BACKENDS,
    Packing,
    additive,
    backend_of,
    connect_prefix,
    open_port,
    port_of,
    uses_prefix_port,
)
from peft_mllm.card import adapter_card
from peft_mllm.data.trees import Batch
from peft_mllm.errors import MethodError, ModelError
from peft_mllm.lean import lean_of
from peft_mllm.methods.base import Method
from peft_mllm.models.base import Family
from peft_mllm.proof import Proof
from peft_mllm.quantization import check_attached, check_trains, size_of
from peft_mllm.recompute import Recompute, set_recompute
from peft_mllm.sharding import Shards
from peft_mllm.switch import switched_off

SAFE_WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
FROZEN_COPY = ".original_module."
"""In the name of what peft keeps of a module that it opens as a whole; it takes no part."""


@dataclass(frozen=True)
class Tuned:
    """A family's model with a method attached.

    Attributes:
        family: the loaded base.
        model: the PeftModel, or the base itself where the method has no PEFT configuration.
        base: the transformers model inside, with the method's layers in it.
        trees: whether samples may share a prefix. Some families and attention backends take no mask of ours,
            and peft's own prompt methods widen a two-dimensional mask in PeftModel's forward: there every sample
            is a padded row.
        bf16: compute in bfloat16 by autocast.
        shards: the pieces in which processes hold its weights; None where each holds all of them.
        proofs: of what was tried on this model, by name: so that it is tried once.
    """

    family: Family
    model: PeftModel | PreTrainedModel
    base: PreTrainedModel
    trees: bool
    bf16: bool = False
    shards: Shards | None = None
    proofs: dict[str, Proof] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.base.parameters()).device

    @property
    def decoder(self) -> PreTrainedModel:
        """The language model's decoder stack."""
        return self.base.get_submodule(self.family.anatomy.llm)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What requires a gradient, by name: it is what is counted, optimised, saved and loaded."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def answer_logits(self, batch: Batch) -> Tensor:
        """Logits (A, V) that predict the batch's answer tokens; none are computed elsewhere."""
        if self._through_base:
            return self.logits_at(batch.rows, batch.columns, packing=batch.packing, **self.asked_of_base(batch))
        with self.precision():
            logits = self.model(**self._inputs(batch)).logits
        widened = logits.shape[1] - batch.input_ids.shape[1]  # virtual tokens stand in front
        return logits[batch.rows, batch.columns + widened]

    def asked_of_base(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the base's own forward for a batch."""
        return self._inputs(batch) | {"position_ids": batch.position_ids, "use_cache": False}

    def logits_at(self, rows: Tensor, columns: Tensor, *, packing: Packing | None = None, **inputs: Any) -> Tensor:
        """Logits (A, V) at places of one forward of the base; its own arguments, and how its row is packed if it is."""
        self._announce(packing)
        lean = lean_of(self.decoder)
        if lean is not None:
            lean.answers = rows, columns
        with self.precision():
            hidden = self.base.base_model(**inputs).last_hidden_state
            trimmed = lean is not None and lean.trimmed
            return self.family.logits(hidden[0] if trimmed else hidden[rows, columns])

    def answer_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy (A,) of each answer token, in float32."""
        return nn.functional.cross_entropy(self.answer_logits(batch).float(), batch.targets, reduction="none")

    def in_step(self) -> AbstractContextManager[None]:
        """Around what each process computes for itself, without gradients; where weights lie in pieces, all wait."""
        return self.shards.together() if self.shards else nullcontext()

    def add_gradients(self, batch: Batch, seed: int, answers: float) -> Tensor:
        """Losses (A,) of a batch; the gradients of their sum over `answers` are added to the parameters'.

        Args:
            batch: on any device.
            seed: of dropout.
            answers: tokens that the losses are averaged over, those of other batches too.
        """
        torch.manual_seed(seed)
        losses = self.answer_losses(batch.to(self.device))
        (losses.sum() / answers).backward()
        return losses.detach()

    @torch.no_grad()
    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Token ids (R, new) after left-padded prompts; options are those of transformers' generate.

        Where the model does not take padding, R must be 1.
        """
        assert self.takes_padding or len(batch.input_ids) == 1, "ask these prompts one by one"
        asked = self.base if self._through_base else self.model
        self._announce(batch.packing)
        with self.precision(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            sequences = asked.generate(**self._inputs(batch), **options)
        return sequences[:, batch.input_ids.shape[1] :]

    @property
    def packs(self) -> bool:
        """Whether the trees of a batch may lie in one row: their layers ask our port, whatever the backend."""
        return self.family.trees and self._through_base and port_of(self.decoder) is not None

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of different length can be asked together; peft's prompt methods lose positions."""
        return self._through_base

    @property
    def _through_base(self) -> bool:
        """Whether the base's own forward has the method in it; peft's prompt methods act in PeftModel's."""
        return not _acts_in_peft_model(self.model)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        mask = batch.attention_mask
        if mask.ndim == 4 and backend_of(self.decoder) == "eager":
            mask = additive(mask, torch.bfloat16 if self.bf16 else self.base.dtype)
        return {"input_ids": batch.input_ids, "attention_mask": mask, **batch.pixels, **batch.extras}

    def _announce(self, packing: Packing | None) -> None:
        """Tell the attention how the next forward's row is packed, if it is; it holds until the one after."""
        port = port_of(self.decoder)
        if port is not None:
            port.packing = packing

    def precision(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def untuned(self) -> Iterator[Tuned]:
        """The base as it was before tuning, until the context ends; nobody else may ask the model meanwhile.

        Adapter layers, parts opened as a whole (connector, vision) and a learned prefix are all switched off.

        Raises:
            MethodError: there is no adapter, or the base's own weights were changed with it.
        """
        lean = lean_of(self.decoder)
        with switched_off(self.model, self.decoder), lean.paused() if lean else nullcontext():
            yield dataclasses.replace(self, model=self.base, proofs={})

    def save(self, directory: Path) -> None:
        """Write a PEFT directory; or, where there is no PEFT method, model, tokenizer and processor."""
        if isinstance(self.model, PeftModel):
            with _prefix_as_saved(self.model):
                # no embeddings: peft would ask the hub whether the base's vocabulary has grown
                self.model.save_pretrained(directory, save_embedding_layers=False)
            # peft's own card is a form that nobody has filled in
            (directory / "README.md").write_text(adapter_card(self.model.active_peft_config), encoding="utf-8")
        else:
            self.family.save(directory)


def attach(
    family: Family,
    method: Method[Any],
    *,
    connector: bool = False,
    vision: bool = False,
    bf16: bool = False,
    recompute: Recompute = "none",
) -> Tuned:
    """Freeze the base, attach a method, and open the parts that are to be tuned.

    What trains is held in float32, whatever the base's type: an update in bfloat16 rounds to nothing.

    Raises:
        MethodError: the method cannot work on this model, or a requested part trains nothing.
    """
    base, anatomy = family.model, family.anatomy
    base.requires_grad_(False)
    parts = ((anatomy.connector, connector), (anatomy.vision, vision))
    opened = [module for modules, tuned_too in parts if tuned_too for module in modules]
    closed = [module for modules, tuned_too in parts if not tuned_too for module in modules]
    try:
        config = method.peft_config(anatomy, base.get_submodule(anatomy.llm).config)
    except ValueError as error:
        raise MethodError(str(error)) from error
    if config is None:
        check_trains(base, method.trains(anatomy))
        for module in method.trains(anatomy):
            base.get_submodule(module).requires_grad_(True)
        for modules, tuned_too in ((closed, False), (opened, True)):  # a family's decoder stack may hold them
            for module in modules:
                base.get_submodule(module).requires_grad_(tuned_too)
        tuned = _connected(family, base, bf16=bf16)
    else:
        if opened:
            config.modules_to_save = [*(getattr(config, "modules_to_save", None) or ()), *opened]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft's use of a name that transformers is changing
                model = get_peft_model(base, config)
        except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise MethodError(f"peft cannot attach {config.peft_type.value}: {error}") from error
        check_attached(model)
        method.initialise(model, anatomy)
        tuned = _connected(family, model, bf16=bf16)
    for parameter in tuned.trainable().values():
        own = parameter.data.float()
        parameter.data = own.clone() if family.is_twin else own
    set_recompute(tuned.base, anatomy, recompute)
    return tuned


def load_adapter(family: Family, directory: str | Path, *, bf16: bool = False, trainable: bool = False) -> Tuned:
    """Put a saved PEFT directory on a base: for evaluation, or so that all it holds trains on.

    Raises:
        ModelError: the directory is no PEFT directory, or does not fit this base.
    """
    import peft_mllm.methods.bottleneck  # noqa: F401 - registers the tuner

    if not (Path(directory) / SAFE_WEIGHTS).is_file() and (Path(directory) / PICKLED_WEIGHTS).exists():
        raise ModelError(f"{directory} holds {PICKLED_WEIGHTS}, a pickle: it is not read, since reading it runs code.")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(family.model, str(directory))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split("\n")[:2])  # torch lists every tensor
        raise ModelError(
            f"{directory} cannot be loaded as a PEFT adapter of this base: {reason} Give the base it was trained on."
        ) from error
    # peft only warns, or says nothing: the adapter is then the base in disguise
    lost = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)] or _unused_keys(
        model, directory
    )
    if lost:
        raise ModelError(f"{directory} does not fit this base: {lost[0]}")
    if trainable:
        _train_on(model)
    return _connected(family, model, bf16=bf16)


def _train_on(model: PeftModel) -> None:
    """Let a loaded adapter train, and nothing else; peft's own switch refuses learned prompts."""
    config = model.active_peft_config
    config.inference_mode = False
    model.requires_grad_(False)
    model.set_adapter(model.active_adapter)  # the method's layers, and the modules that it keeps whole
    if config.is_prompt_learning:
        model.prompt_encoder.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _unused_keys(model: PeftModel, directory: str | Path) -> list[str]:
    """What is in an adapter's file and lands nowhere in the model, in a sentence."""
    file = Path(directory) / SAFE_WEIGHTS
    if not file.is_file():  # from a hub: peft has checked the names it misses
        return []
    with safe_open(file, framework="pt") as tensors:
        unused = sorted(set(tensors.keys()) - set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    return [f"{len(unused)} of its tensors land nowhere, {unused[0]} among them"] if unused else []


def untouched(family: Family, *, bf16: bool = False) -> Tuned:
    """A base as it is."""
    return _connected(family, family.model, bf16=bf16)


def _connected(family: Family, model: PeftModel | PreTrainedModel, *, bf16: bool) -> Tuned:
    if uses_prefix_port(model):
        base = connect_prefix(model, family.anatomy)
    else:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        open_port(base, family.anatomy)
    backend = backend_of(base.get_submodule(family.anatomy.llm))
    trees = family.trees and backend in TREE_BACKENDS and not _acts_in_peft_model(model)
    return Tuned(family=family, model=model, base=base, trees=trees, bf16=bf16)


def _acts_in_peft_model(model: PeftModel | PreTrainedModel) -> bool:
    """Whether a method works in PeftModel's forward only: peft's prompt methods, but not our prefix port."""
    if not isinstance(model, PeftModel) or uses_prefix_port(model):
        return False
    return model.active_peft_config.is_prompt_learning


@contextmanager
def _prefix_as_saved(model: PeftModel) -> Iterator[None]:
    """While saving, a re-parametrised prefix says that it is a plain table: that is what peft writes."""
    name = model.active_adapter
    config = model.peft_config[name]
    if not (uses_prefix_port(model) and config.prefix_projection):
        yield
        return
    model.peft_config[name] = dataclasses.replace(config, prefix_projection=False)
    try:
        yield
    finally:
        model.peft_config[name] = config


@dataclass(frozen=True)
class TrainedPart:
    """What trains of a part.

    Attributes:
        part: llm, connector or vision.
        parameters: how many numbers train.
        total: how many the part has, trained or not.
        learning_rate: at its peak.
    """

    part: Part
    parameters: int
    total: int
    learning_rate: float


def trained_parts(tuned: Tuned, learning_rates: dict[Part, float], wanted: set[Part]) -> list[TrainedPart]:
    """What trains, by part; `wanted` are the parts that were asked for.

    Raises:
        MethodError: a wanted part has nothing that trains, or an unwanted one has.
    """
    counted = dict.fromkeys(PARTS, 0)
    totals = dict.fromkeys(PARTS, 0)
    for name, parameter in tuned.model.named_parameters():
        if FROZEN_COPY in name:
            continue
        part = tuned.family.anatomy.part_of(name)
        totals[part] += size_of(parameter)
        counted[part] += parameter.numel() if parameter.requires_grad else 0
    for part in PARTS:
        if part in wanted and counted[part] == 0:
            raise MethodError(f"The {part} is to be tuned, but nothing of it trains. Check method and location.")
        if part not in wanted and counted[part] > 0:
            raise MethodError(f"The {part} is to stay frozen, but {counted[part]:,} parameters of it train.")
    return [
        TrainedPart(part=part, parameters=counted[part], total=totals[part], learning_rate=learning_rates[part])
        for part in PARTS
        if counted[part]
    ]
