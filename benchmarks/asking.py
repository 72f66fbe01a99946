"""Evaluation: our `evaluate` against HF `generate`, the same greedy answers to the same questions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.case import SEED, Case
from benchmarks.peers import parts_of, peft_model
from benchmarks.turns import Side, Stepped
from benchmarks.workloads import read_data
from peft_mllm.data.opening import open_records
from peft_mllm.evaluation import evaluate
from peft_mllm.spec import GenerationSpec
from peft_mllm.world import World

NEW_TOKENS = 5

Said = list[list[str]]
"""The answers of each pass over all questions."""


def ours(case: Case, said: Said) -> Side:
    """What `peft-mllm evaluate` does with a split, all its questions at once."""

    def train(stepped: Stepped) -> None:
        tuned, records, world = case.attach(), list(open_records(case.data)), World()
        while True:
            evaluation = evaluate(
                tuned,
                records,
                metric="exact",
                max_new_tokens=NEW_TOKENS,
                generation=GenerationSpec(),
                batch_size=case.step,
                seed=SEED,
                world=world,
            )
            said.append(list(evaluation.predictions))
            stepped()

    return Side("ours", train)


def generate(case: Case, said: Said, *, micro: int) -> Side:
    """HF `generate` on left-padded batches of `micro` questions."""

    def train(stepped: Stepped) -> None:
        ask = _asker(case)
        questions = range(case.step)
        while True:
            said.append([text for start in questions[::micro] for text in ask(start, start + micro)])
            stepped()

    return Side(f"HF generate, {micro} at once", train, of="generate")


def _asker(case: Case) -> Callable[[int, int], list[str]]:
    from PIL import Image

    processor, model = case.base.processor, peft_model(case).eval()
    examples = read_data(case.data)

    @torch.no_grad()
    def ask(start: int, end: int) -> list[str]:
        some = examples[start:end]
        images = [Image.open(path).convert("RGB") for example in some for path in example["images"]]
        talks = [parts_of(example)[:-1] for example in some]
        text = processor.apply_chat_template(talks, add_generation_prompt=True)
        batch = processor(
            text=text, images=images, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        ).to(case.base.device)
        with torch.autocast(case.base.device.type, torch.bfloat16, enabled=case.bf16):
            out = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = out[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

    return ask
