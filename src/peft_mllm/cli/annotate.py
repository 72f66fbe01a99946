"""The verb of annotation. Nothing here imports torch until a verb needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_mllm.cli.say import Json, console, example, say_json
from peft_mllm.errors import SpecError

verbs = typer.Typer()


@verbs.command(
    epilog=example(
        "peft-mllm annotate runs/lora --task flickr30k --sample 100 --output captions.html",
        "peft-mllm annotate predictions.jsonl --image-root images --serve --answers alice.json --annotator alice",
        "peft-mllm annotate --agreement alice.json bob.json",
    )
)
def annotate(
    target: Annotated[list[Path], typer.Argument(help="A run, or a file of predictions; or files of answers.")],
    task: Annotated[str | None, typer.Option(help="The task's name, or YAML with its options.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Without a task: the folder of the lines' images.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Draw so many captions, the same of every run.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 42,
    output: Annotated[Path, typer.Option(help="The page.")] = Path("annotate.html"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Open the page here; each answer is kept in --answers.")
    ] = False,
    answers: Annotated[Path, typer.Option(help="With --serve: the file of answers; the same one goes on.")] = Path(
        "answers.json"
    ),
    annotator: Annotated[str, typer.Option(help="Who judges.")] = "",
    port: Annotated[int, typer.Option(min=0, help="With --serve: 0 takes a free one.")] = 0,
    agreement: Annotated[bool, typer.Option("--agreement", help="Count the answers in one file or two.")] = False,
    as_json: Json = False,
) -> None:
    """Judge which captions say what is not there: a page that a person fills in, and what two persons agree on."""
    if agreement:
        show_agreement(target, as_json=as_json)
        return
    if len(target) != 1:
        raise SpecError("One run or one file of predictions is judged at a time; two files are for --agreement.")
    from peft_mllm.annotate.items import items_of
    from peft_mllm.annotate.page import render
    from peft_mllm.files import atomic_write
    from peft_mllm.specfile import parse_value

    named = None if task is None else parse_value(task, "--task")
    items = items_of(target[0], task=named, image_root=image_root, sample=sample, seed=seed)
    if serve:
        serve_page(items, answers, annotator=annotator, port=port)
        return
    atomic_write(output, render(items, annotator=annotator), what="the page")
    console.print(f"{len(items)} captions to judge: open {output} in a browser.", markup=False)


def serve_page(items: Any, answers: Path, *, annotator: str, port: int) -> None:
    """Serve until Ctrl-C."""
    from peft_mllm.annotate.server import AnnotationServer

    server = AnnotationServer(items, answers, annotator=annotator, port=port)
    console.print(f"{len(items)} captions to judge: open {server.address}", markup=False)
    console.print(f"Each answer is kept in {answers} at once; Ctrl-C ends.", markup=False)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    said = server.answers
    console.print(f"{len(said.answers)} of {said.n} are judged; the same command goes on.", markup=False)


def show_agreement(files: list[Path], *, as_json: bool) -> None:
    """What one file of answers or two say."""
    from rich.table import Table

    from peft_mllm.annotate import answers as module

    if len(files) > 2:
        raise SpecError("--agreement takes one file of answers, or two.")
    read = [module.load_answers(file) for file in files]
    counts = [module.count(each) for each in read]
    both = module.agreement(*read) if len(read) == 2 else None
    if as_json:
        say_json({"annotators": counts, "agreement": both})
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("annotator", "judged", "hallucinated", "rate", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "annotator" else "right")
    for file, each in zip(files, counts, strict=True):
        rate = "-" if each["rate"] is None else f"{each['rate']:.1f} %"
        interval = "-" if each["interval"] is None else "{:.1f} to {:.1f} %".format(*each["interval"])
        judged = f"{each['judged']} of {each['of']}"
        table.add_row(each["annotator"] or file.name, judged, str(each["hallucinated"]), rate, interval)
    console.print(table)
    if both is not None:
        kappa = "not defined: both always said the same one thing" if both["kappa"] is None else f"{both['kappa']:.3f}"
        console.print(
            f"\nBoth judged {both['judged_by_both']}: they agree on {both['agreement']:.1f} % (Cohen's kappa {kappa}); "
            f"both found {both['both_yes']} hallucinated.",
            markup=False,
        )
        if both["disagree"]:
            console.print(f"They disagree on: {', '.join(both['disagree'])}", markup=False)
