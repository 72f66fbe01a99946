"""Adapters of the ACL 2024 study's released code (github.com/alenai97/PEFT-MLLM), made standard PEFT directories.

    report = import_adapter("their-output", base="liuhaotian/llava-v1.5-7b", output="lora-peft")

Names, configuration and connector become those of our native models. Every tensor lands, or nothing is written:
loaded as they are, such directories only warn, and the adapter is then the base in disguise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from peft_mllm.card import adapter_card
from peft_mllm.errors import ModelError
from peft_mllm.files import new_directory
from peft_mllm.loading import load_family, recognise
from peft_mllm.models.base import Family
from peft_mllm.released.build import Built, build
from peft_mllm.released.files import CONFIG, Released, read_released
from peft_mllm.released.landing import Landed, land, names
from peft_mllm.released.names import Base
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import SAFE_WEIGHTS, load_adapter

__all__ = ["Imported", "import_adapter"]

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json", "tokenizer_config.json")
"""A directory with one of these is to have a whole tokenizer."""


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        output: the PEFT directory.
        base: the model it is for.
        method: name on our shelf.
        options: of that method, as far as the adapter tells them.
        connector: the modules that were trained beside the adapter and are kept whole in the directory.
        files: file -> what became of its tensors, in words.
        ignored: file -> why it was not read.
        tensors: how many were written.
        parameters: how many numbers they hold.
        notes: what a user should know.
    """

    output: str
    base: str
    method: str
    options: dict[str, Any]
    connector: list[str]
    files: dict[str, str]
    ignored: dict[str, str]
    tensors: int
    parameters: int
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people."""
        options = ", ".join(f"{name} {_word(value)}" for name, value in self.options.items())
        return [
            *(f"read     {name}: {became}" for name, became in self.files.items()),
            *(f"ignored  {name}: {why}" for name, why in self.ignored.items()),
            f"method   {self.method}: {options}",
            f"beside   {', '.join(self.connector) or 'nothing: the connector stays that of the base'}",
            *(f"note     {note}" for note in self.notes),
            f"written  {self.output}: {self.tensors} tensors, {self.parameters:,} numbers; "
            f"read back on {self.base} and found equal",
        ]


def import_adapter(
    directory: str | Path,
    *,
    base: str,
    output: str | Path,
    vision_tower: str | None = None,
    lora_alpha: float | None = None,
) -> Imported:
    """Write a released adapter as a PEFT directory for a native base.

    Args:
        directory: as the released code left it.
        base: the model that it was trained on: an original or converted directory, or a hub id.
        output: the PEFT directory to write; it must not be there, or be empty.
        vision_tower: of a base that comes without its own.
        lora_alpha: of a LoRA whose adapter_config.json is lost.

    Raises:
        ModelError: something cannot be read, has no place in the base, or is missing; nothing is written then.
        DiskError: the directory cannot be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output} is there already. Choose another directory, or remove it.")
    released = read_released(Path(directory))
    family = _base(ModelSpec(path=base, vision_tower=vision_tower))
    place = Base(family)
    landed = land(released, place)
    built = build(released, landed, place, lora_alpha=lora_alpha)
    with new_directory(output, what="the adapter") as temporary:
        _write(built, temporary)
        _check_as_loaded(built, family, temporary)
    return Imported(
        output=str(output),
        base=base,
        method=built.method,
        options=built.options,
        connector=list(landed.modules),
        files=_became(released, landed),
        ignored=dict(released.left),
        tensors=len(built.tensors),
        parameters=sum(tensor.numel() for tensor in built.tensors.values()),
        notes=_notes(released, landed, built),
    )


def _base(spec: ModelSpec) -> Family:
    """The base; of a directory without a tokenizer its model alone, which is all that an import needs."""
    try:
        return load_family(spec, dtype="auto")
    except ModelError:
        here = Path(spec.path)
        if not here.is_dir() or any((here / name).exists() for name in TOKENIZERS):
            raise
    family = object.__new__(recognise(spec.path))
    try:
        family.model, found = AutoModelForImageTextToText.from_pretrained(
            spec.path, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"The model {spec.path} cannot be loaded: {error}") from error
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *(each[0] for each in found["mismatched_keys"])]
    if wrong:
        raise ModelError(f"{spec.path} is not whole, or of another kind than its config.json says: {names(wrong)}.")
    family.model.name_or_path = spec.path
    return family


def _write(built: Built, directory: Path) -> None:
    built.config.save_pretrained(str(directory))
    # copies: the tensors may be views of one another, and of a mapped file
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in built.tensors.items()}
    save_file(tensors, directory / SAFE_WEIGHTS, metadata={"format": "pt"})
    (directory / "README.md").write_text(adapter_card(built.config), encoding="utf-8")


def _check_as_loaded(built: Built, family: Family, directory: Path) -> None:
    """Load what was written, and find every number again in the model."""
    tuned = load_adapter(family, directory)
    loaded = get_peft_model_state_dict(tuned.model, save_embedding_layers=False)
    other = [
        name
        for name, tensor in built.tensors.items()
        if name not in loaded or not torch.equal(tensor.to(loaded[name].dtype), loaded[name].cpu())
    ]
    if other:
        raise ModelError(f"What was written is not what is loaded again: {names(other)}. Nothing is left of it.")


def _became(released: Released, landed: Landed) -> dict[str, str]:
    """What became of each file's tensors."""
    groups = {
        "of the adapter": [stored for linear in landed.linears.values() for stored in linear.values()],
        "of learned keys and values": [landed.table] if landed.table else [],
        "of their encoder, which only resuming needs": list(landed.encoder.values()),
        **{
            f"of {module}": [stored for path, stored in landed.opened.items() if path.startswith(f"{module}.")]
            for module in landed.modules
        },
        **{f"not needed ({why})": stored for why, stored in landed.unused.items()},
    }
    became = {CONFIG: f"peft_type {released.config['peft_type']}"} if released.config else {}
    for file in released.files:
        counts = {what: sum(stored.file == file for stored in group) for what, group in groups.items()}
        counts["that another file has as well"] = released.repeated.get(file, 0)
        became[file] = "tensors: " + "; ".join(f"{count} {what}" for what, count in counts.items() if count)
        if not any(counts.values()):
            became[file] = "no tensors: nothing was trained beside the adapter"
    return became


def _notes(released: Released, landed: Landed, built: Built) -> list[str]:
    notes = list(built.notes)
    if not landed.modules:
        notes.append("No file holds a trained connector: the base's own stays. Is one missing in the directory?")
    if not released.config:
        notes.append(f"There is no {CONFIG}: what it would say was told from the tensors.")
    return notes


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
