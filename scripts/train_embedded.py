"""Make and train the tiny LLaVA that ships in the package, from nothing but seeds.

    python scripts/train_embedded.py --out src/peft_mllm/assets/embedded

Two stages, both on endless scenes of the train split. First tower and connector learn that a patch means words
(as LLaVA starts from CLIP); then connector and decoder learn the seen kinds of `peft_mllm.tasks.scenes`. A batch
is made of trees: all that is asked about a scene shares its prefix (system sentence and image), which costs a
third of asking one by one. The result is a plain `transformers` directory.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from peft_mllm.scenes import COLOURS, COLUMNS, FORMS, ROWS, Scene, make_scene, seeded
from peft_mllm.tasks import TASKS
from peft_mllm.tasks.scenes import SEEN, UNSEEN, SceneTask

SIDE, PATCH = 48, 16  # one patch for each cell of the 3 x 3 grid
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATE = (
    "{%- set ns = namespace(system='" + SYSTEM.replace("'", "\\'") + "') -%}"
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- set ns.system = text(message['content']) -%}"
    "{%- endfor -%}"
    "{{- ns.system + ' ' -}}"
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' -}}"
    "{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- text(message['content']) -}}"
    "{%- else -%}"
    "{{- ' ASSISTANT: ' -}}"
    "{%- generation -%}{{- text(message['content']) + eos_token -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
)
# How often a question is of a kind; beside them every scene has its caption (without it the others stall).
WEIGHTS = {"scenes_at": 3, "scenes_colour": 2, "scenes_exists": 2, "scenes_count": 3}
# Kinds whose words become tokens; a kind added later must not change the tokenizer, nor so the training.
VOCABULARY = (
    *SEEN,
    *("scenes_blank", "scenes_empty", "scenes_row", "scenes_column", "scenes_next", "scenes_choose", "scenes_compare"),
)
QUESTIONS = 7  # about a scene, beside its caption


def tasks(names: tuple[str, ...]) -> dict[str, SceneTask]:
    kinds = {name: TASKS[name] for name in names}
    return {name: kind() for name, kind in kinds.items() if issubclass(kind, SceneTask)}


def make_processor() -> LlavaProcessor:
    """Byte-level BPE over the words of all kinds of questions, and CLIP's preprocessing at our size."""
    corpus = [f"{SYSTEM} USER: ", "</s>USER: ", " ASSISTANT:", "0 1 2 3 4 5 6 7 8 9 A. B. C. D."]
    for task in tasks(VOCABULARY).values():
        for record in task.records("train"):
            question = record.turns[0].text.removeprefix("<image>\n")
            corpus += [f"\n{question} ASSISTANT: {record.answer}", f" {question}"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be written
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    size = {"height": SIDE, "width": SIDE}
    images = LlavaImageProcessorPil(  # pads to a square, as LLaVA-1.5 was trained
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=list(MEAN), image_std=list(STD), do_pad=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: Any, args: argparse.Namespace) -> LlavaForConditionalGeneration:
    width = args.width
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,  # the features are those before the last layer, as in LLaVA
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=4096,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config).float()
    for layer in model.model.multi_modal_projector.modules():
        if isinstance(layer, torch.nn.Linear):  # image tokens as large as text tokens from the start
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.3)
    with torch.no_grad():  # what is read and what is said start out alike, so that copying is easy to find
        model.lm_head.weight.copy_(0.2 * model.get_input_embeddings().weight)
    return model


Branch = list[tuple[str, bool]]
"""What follows the image, in pieces: text, and whether it is to be learned."""


class Batch(NamedTuple):
    """Trees of B scenes, T tokens each with their padding."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T): every branch goes on where the shared prefix ends
    mask: Tensor  # (B, 1, T, T): True where a token may look
    labels: Tensor  # (B, T), already shifted: the token to predict at each place, -100 where none
    pixels: Tensor  # (B, 3, SIDE, SIDE)


class Trees:
    """Makes batches; the one place that knows how a conversation becomes ids."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.words: dict[str, list[int]] = {}
        image = tokenizer.convert_tokens_to_ids("<image>")
        head = self.encode(f"{SYSTEM} USER: ")
        self.prefix = [tokenizer.bos_token_id, *head, *[image] * (SIDE // PATCH) ** 2]

    def encode(self, text: str) -> list[int]:
        """Token ids; texts are few and come again and again."""
        if text not in self.words:
            self.words[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.words[text]

    def batch(self, scenes: list[tuple[Scene, list[Branch]]]) -> Batch:
        """Lay out scenes with their branches."""
        rows = []
        for _, branches in scenes:
            start = len(self.prefix)
            ids, positions, labels, owner = list(self.prefix), [*range(start)], [-100] * start, [0] * start
            for n, branch in enumerate(branches, start=1):
                tokens = [(token, told) for text, told in branch for token in self.encode(text)]
                ids += [token for token, _ in tokens[:-1]]  # nothing follows the last
                labels += [token if told else -100 for token, told in tokens[1:]]
                positions += range(start, start + len(tokens) - 1)
                owner += [n] * (len(tokens) - 1)
            rows.append((ids, positions, labels, owner))
        longest = max(len(row[0]) for row in rows)
        columns = [
            torch.tensor([row[c] + [fill] * (longest - len(row[c])) for row in rows])
            for c, fill in ((0, self.tokenizer.pad_token_id), (1, 0), (2, -100), (3, -1))
        ]
        ids, positions, labels, owner = columns
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
        return Batch(
            ids,
            positions,
            same.tril()[:, None],
            labels,
            see([scene for scene, _ in scenes]),
        )


def asked(question: str, answer: str) -> Branch:
    return [(f"\n{question} ASSISTANT:", False), (f" {answer}</s>", True)]


def training_scenes(args: argparse.Namespace) -> Iterator[list[tuple[Scene, list[Branch]]]]:
    """Endless batches of fresh scenes of the train split, each with its caption and questions."""
    kinds = tasks(SEEN)
    for step in range(args.steps):
        batch = []
        for i in range(args.scenes):
            scene = make_scene(f"embedded {args.seed} {step} {i}", "train")
            rng = seeded(f"embedded questions {args.seed} {step} {i}")
            chosen = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=QUESTIONS)
            pairs = [pair for kind in ["scenes_caption", *chosen] if (pair := kinds[kind].ask(scene, rng))]
            batch.append((scene, [asked(*pair) for pair in pairs]))
        yield batch


def label_logits(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and targets (N,) at the places that have a label, and only there."""
    hidden = model.model(
        input_ids=batch.ids,
        pixel_values=batch.pixels,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    at = batch.labels != -100
    return model.lm_head(hidden[at]), batch.labels[at]


@torch.no_grad()
def forced_accuracy(
    model: LlavaForConditionalGeneration, trees: Trees, names: tuple[str, ...], size: int, split: str
) -> dict[str, float]:
    """Share of answers with every token right given those before: what greedy decoding would say."""
    scores = {}
    model.eval()
    for name, task in tasks(names).items():
        records = task.records(split)[:size]
        batch = trees.batch(
            [(r.images[0].scene, [asked(r.turns[0].text.removeprefix("<image>\n"), r.answer)]) for r in records]
        )
        logits, targets = label_logits(model, batch)
        wrong = torch.zeros(len(records), dtype=torch.bool)
        rows = torch.arange(len(records))[:, None].expand_as(batch.labels)[batch.labels != -100]
        wrong[rows[logits.argmax(-1) != targets]] = True
        scores[name] = round(100 * (~wrong).float().mean().item(), 1)
    model.train()
    return scores


def see(scenes: list[Scene]) -> Tensor:
    """The pictures as the processor would give them, (B, 3, SIDE, SIDE)."""
    pictures = [scene.draw().resize((SIDE, SIDE), Image.Resampling.BICUBIC) for scene in scenes]
    scaled = (np.stack([np.asarray(p, dtype=np.float32) for p in pictures]) / 255 - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous()


def align(model: LlavaForConditionalGeneration, tokenizer: Any, args: argparse.Namespace) -> None:
    """Teach tower and connector that a patch means words: its colour, its form and its place.

    The part of CLIP's training: an image token ends up near the embeddings of the words for what it shows.
    Half a minute here saves the decoder thousands of steps: attending from the word `circle` to the patch
    with the circle is then a match of equal things, the same for all words.
    """
    lists = (["nothing", *COLOURS], ["nothing", *FORMS], list(ROWS), list(COLUMNS))
    words = torch.tensor([tokenizer.convert_tokens_to_ids(f"Ġ{word}") for words in lists for word in words])
    tower, connector = model.model.vision_tower, model.model.multi_modal_projector
    table = model.get_input_embeddings().weight
    learned = [*tower.parameters(), *connector.parameters(), table]
    optimizer = torch.optim.AdamW(learned, lr=1.5e-3, weight_decay=0.0)
    for step in range(1, args.align_steps + 1):
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1.0, step / 50, 2 * (1 - step / (args.align_steps + 1)))
        scenes = [make_scene(f"align {args.seed} {step} {i}", "train") for i in range(64)]
        truth = torch.zeros(64, 9, 4, dtype=torch.long)
        truth[..., 2], truth[..., 3] = torch.arange(9) // 3, torch.arange(9) % 3
        for i, scene in enumerate(scenes):
            for shape in scene.shapes:
                cell = truth[i, 3 * shape.row + shape.column]
                cell[0], cell[1] = lists[0].index(shape.colour), lists[1].index(shape.form)
        features = tower(see(scenes), output_hidden_states=True).hidden_states[-2][:, 1:]  # (64, 9, D)
        tokens = connector(features).flatten(0, 1)  # (576, width)
        said = (tokens @ table[words].T).split([len(words) for words in lists], dim=-1)
        loss = sum(F.cross_entropy(logits, truth[..., i].flatten()) for i, logits in enumerate(said))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            right = torch.stack([logits.argmax(-1) == truth[..., i].flatten() for i, logits in enumerate(said)])
            print(f"align {step}/{args.align_steps} patches right {right.all(0).float().mean():.4f}", flush=True)
    tower.requires_grad_(False)


def train(model: LlavaForConditionalGeneration, trees: Trees, args: argparse.Namespace) -> int:
    """The loop; returns the number of steps taken."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    model.train()
    start = time.monotonic()
    for step, scenes in enumerate(training_scenes(args), start=1):
        # Warm up, stay, and fall linearly over the last third: a step count is all it depends on.
        rate = args.lr * min(1.0, step / 100, max(0.02, (args.steps - step) / (args.steps / 3)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits, targets = label_logits(model, trees.batch(scenes))
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        if step % args.report == 0 or step == args.steps:
            scores = forced_accuracy(model, trees, SEEN, 128, "validation")
            shown = " ".join(f"{name.removeprefix('scenes_')} {score:.0f}" for name, score in scores.items())
            print(f"step {step}/{args.steps} {seconds:.0f} s loss {loss.item():.4f} | {shown}", flush=True)
        if seconds > 60 * args.minutes:
            break
    return step


@torch.no_grad()
def greedy_accuracy(model: Any, processor: Any, name: str, split: str = "test") -> tuple[float, float]:
    """Exact match of the whole greedy answer through `generate`, and the share of the commonest answer."""
    task = tasks((name,))[name]
    records = task.records(split)
    right = 0
    for first in range(0, len(records), 64):
        some = records[first : first + 64]
        prompts = [
            processor.apply_chat_template([{"role": "user", "content": r.turns[0].text}], add_generation_prompt=True)
            for r in some
        ]
        inputs = processor(images=[r.images[0].load() for r in some], text=prompts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
        said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a.strip() == r.answer for a, r in zip(said, some, strict=True))
    answers = [r.answer for r in records]
    return 100 * right / len(records), 100 * max(map(answers.count, set(answers))) / len(records)


def card(facts: dict[str, Any]) -> str:
    def table(scores: dict[str, dict[str, float]]) -> str:
        rows = [f"| `{name}` | {s['accuracy']:.1f} | {s['commonest_answer']:.1f} |" for name, s in scores.items()]
        return "\n".join(["| task | accuracy, % | always the commonest answer, % |", "| --- | --- | --- |", *rows])

    size = f"{facts['parameters']:,} parameters, stored in {facts['dtype']}"
    effort = f"seed {facts['seed']}, {facts['steps']:,} steps of {facts['scenes_per_step']} scenes"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# A tiny LLaVA that has seen coloured shapes

{size}: a CLIP-style tower ({SIDE} x {SIDE} pixels,
patches of {PATCH}), a two-layer connector and a Llama decoder, trained from scratch by
`scripts/train_embedded.py` on generated scenes (`peft_mllm.scenes`). It is an ordinary
`LlavaForConditionalGeneration` directory. It knows nothing but these scenes: it is there to try fine-tuning
methods in seconds, not to answer questions about photographs.

Trained with {effort}, in {facts["seconds"]:,.0f} s on {facts["threads"]} CPU thread(s).
Exact match of the whole greedy answer on scenes of the test split, none of which was ever trained on.

Seen kinds of questions:

{table(facts["seen"])}

Kinds it never saw, without adaptation:

{table(facts["unseen"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--align-steps", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=45, help="stop after this long, whatever the steps")
    parser.add_argument("--scenes", type=int, default=16, help="scenes in a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=int, default=200, help="steps between reports")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processor = make_processor()
    model = make_model(processor.tokenizer, args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(processor.tokenizer)} tokens", flush=True)
    start = time.monotonic()
    align(model, processor.tokenizer, args)
    steps = train(model, Trees(processor.tokenizer), args)
    seconds = time.monotonic() - start

    # The figures are those of the file that is shipped: rounded, written, and loaded again.
    model.to(torch.float16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    model = LlavaForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.out)

    def measure(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
        scores = {name: greedy_accuracy(model, processor, name) for name in names}
        return {n: {"accuracy": round(a, 2), "commonest_answer": round(c, 2)} for n, (a, c) in scores.items()}

    facts = {
        "parameters": parameters,
        "dtype": "float16",
        "seed": args.seed,
        "align_steps": args.align_steps,
        "steps": steps,
        "scenes_per_step": args.scenes,
        "learning_rate": args.lr,
        "seconds": round(seconds, 1),
        "threads": args.threads,
        "seen": measure(SEEN),
        "unseen": measure(UNSEEN),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (args.out / "README.md").write_text(card(facts))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
