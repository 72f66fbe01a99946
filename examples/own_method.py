"""A method of your own, attached and trained through the Python API: LoRA in the last layers only.

    python examples/own_method.py

The class is all that a method is. On the shelf it would be one file and one line (docs/add-a-method.md), and
every task, metric, switch and test would apply to it.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from pydantic import Field

from peft_mllm.anatomy import Anatomy
from peft_mllm.data.supply import Supply
from peft_mllm.evaluation import pad_token
from peft_mllm.loading import load_family
from peft_mllm.methods.base import LocatedOptions, Method
from peft_mllm.spec import ModelSpec
from peft_mllm.tasks import TASKS
from peft_mllm.tuned import attach, load_adapter

STEPS, BATCH = 16, 32


class LastLayersOptions(LocatedOptions):
    """Options of `last_layers`."""

    layers: int = Field(default=2, ge=1)
    """How many, counted from the end."""
    rank: int = Field(default=16, ge=1)
    """Inner width of the update."""


class LastLayers(Method[LastLayersOptions]):
    """Low-rank updates of the linears of the last layers."""

    Options = LastLayersOptions
    learning_rate = 3e-3

    def peft_config(self, anatomy: Anatomy, config: Any) -> PeftConfig:
        """Peft's LoraConfig on paths that name the layers; no bare suffix, which would match the vision tower."""
        last = range(config.num_hidden_layers)[-self.options.layers :]
        layers = "|".join(map(str, last))
        inside = "|".join(re.escape(path) for path in anatomy.roles(self.options.location).values())
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.options.rank,
            lora_alpha=2 * self.options.rank,
            target_modules=rf"{re.escape(anatomy.layers)}\.({layers})\.({inside})",
        )


def main() -> None:
    torch.manual_seed(0)
    method = LastLayers(LastLayersOptions(location="attention"))
    tuned = attach(load_family(ModelSpec(path="embedded"), dtype="float32"), method)
    trainable = tuned.trainable()
    print(f"{len(trainable)} tensors with {sum(p.numel() for p in trainable.values()):,} numbers train")

    task = TASKS["scenes_next"](TASKS["scenes_next"].Options())
    supply = Supply(
        records=task.records("train"),
        encode=tuned.family.encode,
        pixels=tuned.family.pixels,
        pad_id=pad_token(tuned),
        layout="packed",
        share=True,
    )
    optimizer = torch.optim.AdamW(trainable.values(), lr=method.learning_rate)
    losses = []
    for step in range(STEPS):
        (batch,) = supply.batches(range(step * BATCH, (step + 1) * BATCH))
        loss = tuned.answer_losses(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss per answer token: {losses[0]:.2f} at first, {losses[-1]:.2f} after {STEPS} steps")

    # What was saved gives the same logits on a fresh base.
    (batch,) = supply.batches(range(4))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        tuned.model.eval()
        tuned.save(Path(folder))
        loaded = load_adapter(load_family(ModelSpec(path="embedded"), dtype="float32"), folder)
        loaded.model.eval()
        difference = (tuned.answer_logits(batch) - loaded.answer_logits(batch)).abs().max().item()
    print(f"saved and loaded again: logits differ by {difference:g}")


if __name__ == "__main__":
    main()
