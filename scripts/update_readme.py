"""Makes what the documents say about the code and about the demo, between their `<!-- name:begin -->` marks.

    python scripts/update_readme.py                  # the tables and the tree, from the code
    python scripts/update_readme.py runs/demo        # also the demo's table and picture, from its finished runs
    python scripts/update_readme.py --check          # changes nothing; exits 1 if something is out of date

No figure stands in this file. Doing it twice changes nothing the second time.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peft_mllm import errors, spec
from peft_mllm.files import read_json
from peft_mllm.listing import describe, options_of
from peft_mllm.methods import METHODS
from peft_mllm.study.analyse import analyse
from peft_mllm.study.analysis import Analysis
from peft_mllm.study.drawings.canvas import Drawing, page_svg, to_svg
from peft_mllm.study.pages.sections import sections
from peft_mllm.study.reading import read_study
from peft_mllm.study.results import Result
from peft_mllm.study.tables.overview import overview
from peft_mllm.study.tables.writers import markdown_table
from peft_mllm.study.view import View
from peft_mllm.study.wording import and_list, duration

ROOT = Path(__file__).resolve().parent.parent
README = Path("README.md")
TOUR = Path("docs/tour.md")
PICTURE = Path("docs/images/demo.svg")
SPEED = Path("benchmarks/results/cpu.json")
COLUMNS = ("method", "score", "letters", "gain", "seen", "forgotten", "trainable", "disk", "seconds")
"""Of the demo's table."""
LETTERS = "Methods that share a letter cannot be told apart."

EXITS = {
    "EXIT_DONE": "done",
    "EXIT_USAGE": "the command, the spec, the model or the method cannot be used as asked; no step was taken",
    "EXIT_DIVERGED": "a loss or gradient was not finite; stopped before the update, the samples are named",
    "EXIT_BAD_DATA": "the data has errors; each is named with its place and remedy",
    "EXIT_INTERNAL": "a defect of ours; please report it with the lines above the message",
    "EXIT_DISK": "a file could not be written, or what is there cannot be trusted",
    "EXIT_INTERRUPTED": "SIGTERM or Ctrl-C; saved, and the same command goes on",
}
BLOCKS: dict[str, tuple[type[BaseModel], str]] = {
    "model": (spec.ModelSpec, ""),
    "data": (spec.DataSpec, ""),
    "train": (spec.TrainSpec, "As in HF `TrainingArguments`."),
    "generation": (spec.GenerationSpec, "As in transformers' `GenerationConfig`."),
    "retention": (spec.RetentionSpec, ""),
    "curve": (spec.CurveSpec, ""),
    "speed": (spec.SpeedSpec, ""),
}
"""The spec's parts with many keys, and what a key without a word of its own means."""
WORDS = {
    "train.connector_learning_rate": "Of the connector's parameters, where it is tuned.",
    "train.vision_learning_rate": "Of the vision tower's parameters, where it is tuned.",
    "train.lr_scheduler_kwargs": "Further keyword arguments of that schedule.",
}
"""Of keys that the spec's classes say nothing about."""
FOLDERS = {
    "assets/embedded": "the embedded base: a small trained LLaVA, as plain transformers loads it",
    "assets/evidence": "what studies found, for `peft-mllm advise`",
    "study/pages/templates": "the page of a study's report, with its style and script",
    "versus/templates": "the page that compares two runs",
}
STANDALONE = (
    "svg{color:#1f2328;background:#fff;font-family:system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}"
)
"""The figures take colour and font from their page; a file that stands alone brings its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring README and docs up to date.")
    parser.add_argument("runs", nargs="?", type=Path, help="the demo's directory, such as runs/demo")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    asked = parser.parse_args()
    stale = []
    for path, text in wanted(asked.runs).items():
        file = ROOT / path
        present = file.read_text(encoding="utf-8") if file.is_file() else ""
        if present == text:
            continue
        stale.append(path)
        if asked.check:
            lines = (each.splitlines(keepends=True) for each in (present, text))
            sys.stdout.writelines(difflib.unified_diff(*lines, fromfile=str(path), tofile=f"{path}, from the code"))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            print(f"{path}: renewed")
    if asked.check and stale:
        again = " ".join(["python scripts/update_readme.py", *([str(asked.runs)] if asked.runs else [])])
        sys.exit(f"Out of date: {', '.join(map(str, stale))}. Run: {again}")
    if not stale:
        print("All is up to date.")


def wanted(runs: Path | None) -> dict[Path, str]:
    """Each file with the text that it should have."""
    readme, tour = ((ROOT / path).read_text(encoding="utf-8") for path in (README, TOUR))
    readme = between(readme, "methods", methods_table())
    readme = between(readme, "exits", exits_table())
    readme = between(readme, "tree", tree())
    if (ROOT / SPEED).is_file():
        readme = between(readme, "speed", speed_section())
    untold = [key for key in spec.Spec.model_fields if f"`{key}`" not in tour]
    if untold:
        sys.exit(f"{TOUR} does not explain {and_list(untold)} in its first table of keys.")
    for name, (model, otherwise) in BLOCKS.items():
        tour = between(tour, name, keys_table(name, model, otherwise))
    files = {TOUR: tour}
    if runs is not None:
        analysis = analyse(read_study(runs))
        results = [outcome.result for outcome in analysis.outcomes if outcome.result is not None]
        readme = between(readme, "demo", demo_section(analysis, made_on(results)))
        readme = between(readme, "result", shortened(next(each for each in results if not each.is_zero_shot)))
        files[PICTURE] = picture(picture_of(analysis))
    return {README: readme, **files}


def between(text: str, name: str, content: str) -> str:
    """The text with new content between the marks of a name."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        sys.exit(f"There must be one pair of marks <!-- {name}:begin --> and <!-- {name}:end -->.")
    return pattern.sub(lambda found: f"{found[1]}\n{content.strip()}\n\n{found[2]}", text)


# --- from the code ---


def methods_table() -> str:
    """Every method of the shelf with its default learning rate and its options."""
    lines = ["| Method | What it is | Learning rate | Options |", "|---|---|---|---|"]
    for name in METHODS:
        about = describe(METHODS, name)
        options = ", ".join(f"`{option['name']}`" for option in about["options"]) or "none"
        lines.append(f"| `{name}` | {about['summary']} | {about['learning_rate']:g} | {options} |")
    return "\n".join(lines)


def exits_table() -> str:
    """Every exit code of errors.py with its words."""
    codes = {name: code for name, code in vars(errors).items() if name.startswith("EXIT_")}
    if codes.keys() != EXITS.keys():
        sys.exit(f"EXITS in {Path(__file__).name} lacks or has too much: {codes.keys() ^ EXITS.keys()}.")
    lines = [f"| {code} | {EXITS[name]} |" for name, code in sorted(codes.items(), key=lambda item: item[1])]
    return "\n".join(["| Code | Meaning |", "|---|---|", *lines])


def keys_table(prefix: str, model: type[BaseModel], otherwise: str) -> str:
    """Every key of a part of the spec, from its pydantic class."""
    lines = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for option in options_of(model):
        default = {"None": "none", "True": "true", "False": "false", "()": "[]"}.get(*[option["default"]] * 2)
        kind = option["type"].replace("|", "\\|")
        key = f"{prefix}.{option['name']}"
        meaning = option["meaning"] or WORDS.get(key, otherwise)
        lines.append(f"| `{key}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines)


def tree() -> str:
    """Every module of the package with the first sentence of its docstring."""
    source = ROOT / "src" / "peft_mllm"
    return "\n".join(["```", "src/peft_mllm/", *branches(source, source, 1), "```"])


def branches(folder: Path, source: Path, depth: int) -> Iterator[str]:
    """The lines of a folder: its modules, then the folders in it."""
    indent = "  " * depth
    for file in sorted(folder.glob("*.py")):
        if file.name not in ("__init__.py", "__main__.py"):
            yield f"{indent}{file.name:<{28 - 2 * depth}}{first_sentence(file)}"
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"):
        init = inner / "__init__.py"
        about = first_sentence(init) if init.is_file() else FOLDERS.get(str(inner.relative_to(source)), "")
        yield f"{indent}{inner.name + '/':<{28 - 2 * depth}}{about}"
        yield from branches(inner, source, depth + 1)


def first_sentence(module: Path) -> str:
    """Of a module's docstring, as far as its first line goes."""
    line = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return re.split(r"(?<! al)\. ", line)[0].rstrip(".")


def speed_section() -> str:
    """The benchmark's table with what it says, from what `make bench` wrote."""
    sys.path.insert(0, str(ROOT))  # the benchmark is no part of the package
    from benchmarks.table import section

    return section(read_json(ROOT / SPEED))


# --- from the demo's runs ---


def demo_section(analysis: Analysis, made: str) -> str:
    """Table, conclusion, cautions, picture, and where the figures come from."""
    table = markdown_table(overview(View(analysis)).only(COLUMNS)).split("\n\n")[1]
    sentences = [block.sentence for block in analysis.blocks]
    shown = f'<img src="{PICTURE}" width="900" alt="{picture_of(analysis).title}">'
    return "\n\n".join([table.strip(), LETTERS, *sentences, " ".join(analysis.notes), made, shown])


def made_on(results: list[Result]) -> str:
    """Where the figures come from."""
    machine, trained = results[0].environment, [result for result in results if not result.is_zero_shot]
    questions = {source.used for result in trained for source in result.data.values()}
    return (
        f"Made by `make demo` on {machine['device']} (torch {machine['torch']}), each run trained on "
        f"{and_list([str(n) for n in sorted(questions)])} questions; the runs in this table took "
        f"{duration(sum(result.seconds for result in trained))} of training in all, without the trials."
    )


def shortened(result: Result) -> str:
    """What most people look for in a result.json, as it stands there."""
    assert result.directory is not None
    whole = read_json(result.directory / "result.json")
    kept = {key: whole[key] for key in ("name", "spec_id", "trainable")}
    kept["data"] = {split: some(each, "task", "read", "used", "quarantined") for split, each in whole["data"].items()}
    kept["training"] = some(whole["training"], "steps", "epochs", "seconds", "tokens_per_second")
    task = str(result.spec["task"]["name"])
    score = whole["scores"][task]
    kept["scores"] = {
        task: some(score, "metric", "n", "unparsed") | {"values": some(score["values"], *score["values"])}
    }
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
    return f"```json\n{{\n{lines}\n}}\n```"


def some(whole: dict[str, Any], *keys: str) -> dict[str, Any]:
    """These keys alone; no more than three decimals, for the reader's sake."""
    return {key: round(whole[key], 3) if isinstance(whole[key], float) else whole[key] for key in keys}


def picture_of(analysis: Analysis) -> Drawing:
    """The report's figure that README shows."""
    return next(figure for part in sections(View(analysis)) for figure in part.figures if figure.key == "pareto")


def picture(drawing: Drawing) -> str:
    """The figure as an SVG file of its own, for light and dark pages."""
    head, rest = page_svg(to_svg(drawing), drawing.key, drawing.title).split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">\n<style>{STANDALONE}</style>{rest.rstrip()}\n'


if __name__ == "__main__":
    main()
