"""Recordings of the study's released code: its bases, its adapters, and what it computed with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from peft_mllm.data.encode import IGNORED
from peft_mllm.loading import load_family
from peft_mllm.models import Family
from peft_mllm.spec import ModelSpec

IMAGE = -200
"""Stands in the recorded LLaVA ids for an image."""


@dataclass(frozen=True)
class Llava:
    """The LLaVA recordings: `cases/golden/llava`."""

    root: Path

    @cached_property
    def numbers(self) -> dict[str, Tensor]:
        return load_file(self.root / "golden.safetensors")

    @property
    def base(self) -> ModelSpec:
        return ModelSpec(path=str(self.root / "checkpoint"), vision_tower=str(self.root / "vision_tower"))

    def family(self, dtype: str = "float32") -> Family:
        return load_family(self.base, dtype=dtype)

    def adapter(self, kind: str) -> Path:
        return self.root / "adapters" / kind

    def wanted(self, kind: str) -> dict[str, Tensor]:
        return load_file(self.root / "adapter_goldens" / f"{kind}.safetensors")

    def norms(self, kind: str) -> dict[str, float]:
        return json.loads((self.root / "adapter_goldens" / f"{kind}.json").read_text())["batch_grad_norms"]

    def inputs(self, name: str, placeholder: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A prompt (p0) or training sample (t0), as arguments of the native model's forward."""
        ids, pixels = self._expanded(self.numbers[f"{name}.input_ids"], placeholder), self._pixels(name)
        return {"input_ids": ids} | ({} if pixels is None else {"pixel_values": pixels.to(dtype)})

    def labels(self, name: str) -> Tensor:
        """(1, T) of a training sample."""
        ids, labels = self.numbers[f"{name}.input_ids"], self.numbers[f"{name}.labels"]
        both = zip(ids.tolist(), labels.tolist(), strict=True)
        spread = [[IGNORED] * self._patches if i == IMAGE else [label] for i, label in both]
        return torch.tensor([list(chain(*spread))])

    def _expanded(self, ids: Tensor, placeholder: int) -> Tensor:
        spread = [[placeholder] * self._patches if i == IMAGE else [i] for i in ids.tolist()]
        return torch.tensor([list(chain(*spread))])

    @property
    def _patches(self) -> int:
        return self.numbers["image_features"].shape[1]

    def _pixels(self, name: str) -> Tensor | None:
        told = json.loads((self.root / "golden.json").read_text())["prompts"]
        files = told[name]["images"] if name in told else self._image_of_sample(int(name[1:]))
        return self.numbers["pixel_values"][[int(file[3]) for file in files]] if files else None  # img0.png: row 0

    def _image_of_sample(self, number: int) -> list[str]:
        sample = json.loads((self.root / "train_samples.json").read_text())[number]
        return [sample["image"]] if "image" in sample else []


def apart(got: Tensor, wanted: Tensor) -> float:
    """The largest difference; of the last positions where not all were recorded."""
    return float((got[-len(wanted) :].float() - wanted).abs().max())


def logits_of(wanted: dict[str, Tensor], name: str) -> Tensor:
    """The recorded logits under a name, however many positions of them."""
    return next(wanted[key] for key in wanted if key.startswith(f"{name}.logits"))


def told(what: str, difference: float, limit: float) -> None:
    """Print a difference (shown by `pytest -rP`), and hold it against its tolerance."""
    print(f"{what}: {difference:.2e} (at most {limit:.0e})")  # noqa: T201 - the differences are to be seen
    assert difference <= limit, what


def norms_apart(gradients: dict[str, Any], wanted: dict[str, float]) -> float:
    """The largest relative difference of gradient norms; both name the same parameters."""
    assert gradients.keys() == wanted.keys()
    return max(abs(float(gradients[name].norm()) - norm) / norm for name, norm in wanted.items())


@dataclass(frozen=True)
class QwenVL:
    """The Qwen-VL recordings: `cases/golden/qwen_vl`. The checkpoint has no tokenizer: tokens are bytes."""

    root: Path

    @cached_property
    def numbers(self) -> dict[str, Tensor]:
        return load_file(self.root / "golden.safetensors")

    @property
    def base(self) -> str:
        return str(self.root / "checkpoint")

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.base, dtype=dtype).eval()

    def adapter(self, kind: str) -> Path:
        return self.root / "adapters" / kind

    def wanted(self, kind: str) -> dict[str, Tensor]:
        return load_file(self.root / "adapter_goldens" / f"{kind}.safetensors")

    def norms(self, kind: str) -> dict[str, float]:
        return json.loads((self.root / "adapter_goldens" / f"{kind}.json").read_text())["grad_norms"]

    def inputs(self, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A recorded prompt as arguments of the native model's forward."""
        pixels = {"pixel_values": self.numbers["pixel_values"][:1].to(dtype)} if name == "one_image" else {}
        return {"input_ids": self.numbers[f"{name}.input_ids"], **pixels}

    def training(self) -> dict[str, Tensor]:
        """The three training samples as one batch; the first and the last show an image."""
        names = {"input_ids": "train.input_ids", "attention_mask": "train.attention_mask", "labels": "train.labels"}
        return {name: self.numbers[key] for name, key in names.items()} | {"pixel_values": self.numbers["pixel_values"]}
