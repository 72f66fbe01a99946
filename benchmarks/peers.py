"""The other trainers, with their best flags: HF Trainer + peft, and TRL's SFTTrainer on its own path for images.

Neither recomputes activations (TRL does by default), both attend by sdpa and step with fused AdamW. HF Trainer takes
a collator as its guides write one; TRL takes a data set of prompts, completions and images, and computes logits
where there are labels only. Both are given the samples of each step in order of length, so that a micro-batch has
like lengths (what `group_by_length` is for) and each step the samples that ours has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.case import RATE, SEED, Case
from benchmarks.seen import Seen, watching
from benchmarks.turns import Side, Stepped
from benchmarks.workloads import Example, read_data

REPEATED = 64
"""Steps of a timed training that the data lasts for; no turn is taken so often."""
IGNORED = -100


class _Ends(TrainerCallback):
    """Says when a step ends."""

    def __init__(self, stepped: Stepped):
        self._stepped = stepped

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called by the trainer."""
        self._stepped()


def _watched(kind: type[Trainer], seen: Seen) -> type[Trainer]:
    """The trainer with its samples in the given order, and its losses told in full precision."""

    class Watched(kind):
        _of_step: Any = 0.0

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            self._of_step = self._of_step + loss
            if self.accelerator.sync_gradients:
                seen.losses.append(self._of_step)
                self._of_step = 0.0
            return loss

    return Watched


def arguments(case: Case, steps: int, micro: int) -> dict[str, Any]:
    """TrainingArguments of both."""
    cuda = case.base.device.type == "cuda"
    return {
        "output_dir": str(case.folder / "peer"),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": math.ceil(case.step / micro),
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": case.bf16,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": SEED,
    }


def peft_model(case: Case) -> PeftModel:
    """What a user of peft makes: the method's configuration on the base, here with our start's weights."""
    tuned = case.attach()
    assert isinstance(tuned.model, PeftModel), f"{case.method} is no method of peft"
    start = get_peft_model_state_dict(tuned.model, save_embedding_layers=False)
    model = get_peft_model(case.base.twin().model, tuned.model.active_peft_config)
    set_peft_model_state_dict(model, start)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def in_steps(case: Case, order: Sequence[Sequence[int]] | None) -> list[Example]:
    """The samples of all steps, those of a step by length; without an order the whole file is each step."""
    examples = read_data(case.data)
    lengths = [len(case.base.processor.tokenizer(_text(example)).input_ids) for example in examples]
    lengths = [length + 10_000 * len(example["images"]) for length, example in zip(lengths, examples, strict=True)]
    steps = order or [range(len(examples))] * REPEATED
    return [examples[i] for step in steps for i in sorted(step, key=lambda i: lengths[i])]


def _text(example: Example) -> str:
    return " ".join(turn["content"] for turn in example["messages"])


# --- HF Trainer ---


def hf(
    case: Case,
    *,
    micro: int | None = None,
    order: Sequence[Sequence[int]] | None = None,
    seen: Seen | None = None,
    name: str = "HF Trainer + peft",
) -> Side:
    """HF Trainer on a PeftModel."""

    def train(stepped: Stepped) -> None:
        told = seen or Seen()
        examples = in_steps(case, order)
        trainer = _watched(Trainer, told)(
            model=peft_model(case),
            args=TrainingArguments(**arguments(case, len(order) if order else REPEATED, micro or case.step)),
            train_dataset=examples,
            data_collator=collator(case.base.processor),
            callbacks=[_Ends(stepped)],
        )
        trainer.remove_callback(PrinterCallback)
        with watching(seen) if seen is not None else nullcontext():
            trainer.train()

    return Side(name, train, of="hf")


def collator(processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
    """Conversations to padded tensors with labels on the answers, as the guides of LLaVA and Qwen-VL do it."""
    from PIL import Image

    tokenizer = processor.tokenizer

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        images = [Image.open(path).convert("RGB") for example in examples for path in example["images"]]
        given = {"images": images} if images else {}
        talks = [parts_of(example) for example in examples]
        whole = processor.apply_chat_template(talks, tokenize=False)
        questions = processor.apply_chat_template([talk[:-1] for talk in talks], add_generation_prompt=True)
        batch = processor(
            text=whole, **given, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        for row, (text, question) in enumerate(zip(whole, questions, strict=True)):
            # the answer's tokens, counted from the end: what the question's placeholders become does not matter
            answer = len(tokenizer(text[len(question) :], add_special_tokens=False).input_ids)
            end = int(batch["attention_mask"][row].sum())
            labels[row, : end - answer] = IGNORED
        return {**batch, "labels": labels}

    return collate


def parts_of(example: Example) -> list[dict[str, Any]]:
    """The conversation in the form of chat templates: images as parts of the content."""
    talk = []
    for turn in example["messages"]:
        text = turn["content"].removeprefix("<image>\n")
        image = [{"type": "image"}] if text != turn["content"] else []
        talk.append({"role": turn["role"], "content": [*image, {"type": "text", "text": text}]})
    return talk


# --- TRL ---


def trl(
    case: Case,
    *,
    micro: int | None = None,
    order: Sequence[Sequence[int]] | None = None,
    seen: Seen | None = None,
    name: str = "TRL SFTTrainer",
) -> Side:
    """TRL's SFTTrainer on a PeftModel, with its own collator and loss."""

    def train(stepped: Stepped) -> None:
        from trl import SFTConfig, SFTTrainer

        told = seen or Seen()
        steps = len(order) if order else REPEATED
        args = SFTConfig(**arguments(case, steps, micro or case.step), max_length=None)
        trainer = _watched(SFTTrainer, told)(
            model=peft_model(case),
            args=args,
            train_dataset=dataset(in_steps(case, order)),
            processing_class=case.base.processor,
            callbacks=[_Ends(stepped)],
        )
        trainer.remove_callback(PrinterCallback)
        with watching(seen) if seen is not None else nullcontext():
            trainer.train()

    return Side(name, train, of="trl")


def dataset(examples: Sequence[Example]) -> Any:
    """Prompts, completions and images, as TRL's guide for vision-language models has them."""
    from datasets import Dataset, Features, Image, List, Value

    turn = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": turn, "completion": turn, "images": List(Image())})
    rows = [
        {
            "prompt": [
                turn | {"content": turn["content"].removeprefix("<image>\n")} for turn in example["messages"][:-1]
            ],
            "completion": example["messages"][-1:],
            "images": example["images"],
        }
        for example in examples
    ]
    return Dataset.from_list(rows, features=features)


PEERS = {"hf": hf, "trl": trl}
