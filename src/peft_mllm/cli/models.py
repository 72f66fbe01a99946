"""Verbs of models and adapters. Nothing here imports torch until a verb needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from peft_mllm.cli.say import Json, console, example, say_json

verbs = typer.Typer()

WeightType = Literal["auto", "float32", "bfloat16", "float16"]


@verbs.command(
    epilog=example(
        "peft-mllm convert checkpoints/llava-v1.5-7b llava-1.5-7b --vision-tower openai/clip-vit-large-patch14-336",
        "peft-mllm convert Lin-Chen/ShareGPT4V-7B sharegpt4v-7b",
        "peft-mllm convert checkpoints/Qwen-VL-Chat qwen-vl-chat",
    )
)
def convert(
    source: Annotated[str, typer.Argument(help="A directory or hub id: original LLaVA-1.5, ShareGPT4V, Qwen-VL.")],
    directory: Annotated[Path, typer.Argument(help="A new directory in the Hugging Face format.")],
    vision_tower: Annotated[str | None, typer.Option(help="Directory or hub id, if it is not the one named.")] = None,
    dtype: Annotated[WeightType, typer.Option(help="Of all weights; auto leaves each as it is stored.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write an original checkpoint as a directory that plain transformers loads."""
    from peft_mllm.convert import convert as converted

    done = converted(source, directory, vision_tower=vision_tower, dtype=dtype, quiet=as_json)
    if as_json:
        say_json(done.to_json())
        return
    for line in done.lines():
        console.print(line, markup=False)


@verbs.command(
    "import-adapter",
    epilog=example(
        "peft-mllm import-adapter output/llava-lora --base checkpoints/llava-v1.5-7b --out adapters/lora",
        "peft-mllm import-adapter output/qwen --base checkpoints/Qwen-VL-Chat --out adapters/qwen --lora-alpha 256",
    ),
)
def import_adapter(
    directory: Annotated[Path, typer.Argument(help="What the study's released code, or its Trainer, has saved.")],
    base: Annotated[str, typer.Option(help="The model it was trained on: original or converted, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The PEFT directory to write.")],
    vision_tower: Annotated[str | None, typer.Option(help="The base's tower, where it comes without one.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Of a LoRA whose adapter_config.json is lost.")] = None,
    as_json: Json = False,
) -> None:
    """Make a standard PEFT directory of an adapter that the study's released code has trained."""
    from peft_mllm.released import import_adapter as imported

    report = imported(directory, base=base, output=out, vision_tower=vision_tower, lora_alpha=lora_alpha)
    if as_json:
        say_json(report.to_json())
        return
    for line in report.lines():
        console.print(line, markup=False)


@verbs.command(
    epilog=example(
        "peft-mllm export runs/lora",
        "peft-mllm export runs/lora --merge --output my-model",
        "peft-mllm export runs/ia3 --as-lora 32 --check 200",
        "peft-mllm export my-adapter --base llava-hf/llava-1.5-7b-hf --output published",
    )
)
def export(
    target: Annotated[str, typer.Argument(help="A finished run directory, or a PEFT directory.")],
    output: Annotated[Path | None, typer.Option(help="A new directory; RUN/export/... if left out.")] = None,
    base: Annotated[str | None, typer.Option(help="The base of a PEFT directory.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Of a base that comes without its own.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the base with the method merged in.")] = False,
    as_lora: Annotated[int | None, typer.Option(min=1, metavar="RANK", help="Write the nearest LoRA.")] = None,
    check: Annotated[
        int | None, typer.Option(min=1, help="With --as-lora: also ask this many questions of each task.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run for use elsewhere: with a model card, and proven in a fresh process."""
    import peft_mllm
    from peft_mllm.card import sealed_facts

    made = peft_mllm.export(
        target, base=base, vision_tower=vision_tower, output_dir=output, merge=merge, as_lora=as_lora, check=check
    )
    if as_json:
        say_json(made)
        return
    for name, value in sealed_facts(made):
        console.print(f"{name}: {value}", markup=False)
    console.print(f"\nExported and sealed: {made['directory']}", markup=False)
    console.print(f"Run in that directory, this loads it:\n\n{made['load']}", markup=False)


@verbs.command(
    epilog=example(
        "peft-mllm chat embedded --image photo.png",
        "peft-mllm chat runs/lora --web",
        "peft-mllm chat llava-hf/llava-1.5-7b-hf --adapter my-adapter --max-new-tokens 200",
        "peft-mllm chat runs/lora --json < questions.txt",
    )
)
def chat(
    target: Annotated[str, typer.Argument(help="A model, a run directory, or a PEFT directory.")],
    adapter: Annotated[Path | None, typer.Option(help="A PEFT directory or a run, to put on the model.")] = None,
    base: Annotated[str | None, typer.Option(help="The base of a PEFT directory.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Of a base that comes without its own.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Shown with the first question; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first; else its own sentence.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer is cut here.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 says what is likeliest; above, it is drawn.")] = 0.0,
    web: Annotated[bool, typer.Option("--web", help="As a page in the browser (needs the extra `web`).")] = False,
    host: Annotated[str, typer.Option(help="With --web: where to listen; this machine only.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="With --web: a free one if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Talk with a model, with its adapter or without; each line of standard input is a question."""
    from peft_mllm.chat.start import chat as talk

    code = talk(
        target,
        adapter=adapter,
        base=base,
        vision_tower=vision_tower,
        images=image or (),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        web=web,
        host=host,
        port=port,
        as_json=as_json,
    )
    raise typer.Exit(code)


@verbs.command(
    epilog=example(
        "peft-mllm matrix",
        "peft-mllm matrix --methods lora,VERA --families llava --json",
        "peft-mllm matrix --quick --output runs/quick-matrix",
    )
)
def matrix(
    methods: Annotated[
        str | None, typer.Option(help="Some, with commas: lora (all its variants), 'lora dora', VERA; all if left out.")
    ] = None,
    families: Annotated[str | None, typer.Option(help="Some tiny models, with commas; all if left out.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for matrix.json and matrix.md.")] = Path("runs/matrix"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; as many as processors if left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Most methods on the first model alone.")] = False,
    as_json: Json = False,
) -> None:
    """Try every method on a tiny model of every family: what works with what."""
    from peft_mllm.matrix.make import PAGE, make_matrix

    made = make_matrix(
        output,
        methods=methods.split(",") if methods else (),
        families=families.split(",") if families else (),
        jobs=jobs or os.cpu_count() or 1,
        quick=quick,
    )
    if as_json:
        say_json(made.to_json())
    else:
        console.print(made.summary(), markup=False)
        console.print(f"\nThe page: {output / PAGE}", markup=False)


@verbs.command(
    epilog=example(
        "peft-mllm inspect embedded",
        "peft-mllm inspect Qwen/Qwen2.5-VL-7B-Instruct",
        "peft-mllm inspect tiny:generic/mllama --json",
    )
)
def inspect(
    model: Annotated[str, typer.Argument(help="`embedded`, a directory, a hub id, or tiny:FAMILY[/MEMBER].")],
    vision_tower: Annotated[
        str | None, typer.Option(help="Directory or hub id of the tower, for a checkpoint without its own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's parts and what each method would train of it, without reading its weights."""
    from peft_mllm.inspection import inspect_model
    from peft_mllm.inspection.page import page
    from peft_mllm.spec import ModelSpec

    facts = inspect_model(ModelSpec(path=model, vision_tower=vision_tower))
    if as_json:
        say_json(facts.to_json())
    else:
        console.print(page(facts))
