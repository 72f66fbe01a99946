"""Makes docs/tasks.md from the tasks on the shelf.

python scripts/tasks_page.py            # writes the page
python scripts/tasks_page.py --check    # changes nothing; exits 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

from peft_mllm.listing import options_of
from peft_mllm.preparing import catalogue
from peft_mllm.tasks import TASKS
from peft_mllm.tasks.reading import SampledOptions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tasks.md"
MODELS = {"llava-1.5": "LLaVA-1.5", "sharegpt4v": "ShareGPT4V", "qwen-vl-chat": "Qwen-VL-Chat"}

HEAD = """# Tasks

This page is made from the tasks by `scripts/tasks_page.py`; a test compares the two, and runs the commands below on
made-up releases in their owners' layouts.

A task is one data set: its records, an agreed way to ask, and the name of its [metric](metrics.md). The data sets of
the study, and some beyond it, are read from a folder that `peft-mllm data prepare` makes of the files as their owners
publish them. Nothing is downloaded for you but with `--hub`: licences are yours to accept.
"""

PREPARING = """## Preparing a data set

```bash
peft-mllm data prepare --list                                  # where to get each, how large it is, its licence
peft-mllm data prepare vizwiz --source downloads/vizwiz        # the files as downloaded, or what they unpack to
```

`--source` is the folder with the files; how they lie in it does not matter, and neither does whether they are
unpacked. The outcome is one folder below `--output` (`datasets`), and that folder is the task's option `root`:

```text
datasets/vizwiz/
  prepared.json              what it is: numbers of questions, sha256 of the files it was made from; sealed
  train/  val/               the images; the names of the splits are the release's
  train.jsonl  val.jsonl     the questions, as the release has them
  images_train.jsonl ...     sha256 of every image: one that changes later is an error when it is loaded
  llava_train.json ...       the same as LLaVA JSON and as Qwen-VL JSON, asked with one prompt (`--prompt`), image
  qwen_train.json ...        paths relative to the folder: for `data check`, and for other programs
  samples/                   ids of random samples: 1,000, 5,000 and 10,000 training questions, 20,000 where the
                             study uses them
```

- **Checked.** Numbers of questions must be those of the release, checksums right where one is known (the others are
  recorded), every image is decoded, ids are unique, questions and annotations match. What is wrong is said at once.
- **`--partial`** goes on where a release is not whole: questions whose image is missing or broken are left out and
  listed in `left_out.jsonl`. The folder and every result on it say `partial`. `--limit N` takes the first questions of
  each split; `--split test` only what is to be scored.
- **Resumable.** What was stopped or killed goes on with the same command, and does no image twice. In a finished
  folder it brings back what is gone.
- **Archives** are read, not unpacked: a path or a link that leads out of one is refused. Images that lie unpacked on
  the same disk get a second name (a hard link), which costs no space.
- **`--hub`** reads through the `datasets` library (`pip install 'peft-mllm[hub]'`): from the hub, or with `--source`
  from a folder that `save_to_disk` wrote or that holds parquet files. Hub copies are other people's; some have no
  training split.

## How much of it is used

The study trains on 20,000 random questions of VQAv2 and OCR-VQA and scores 5,000; these are the defaults of the two.
Which ones was not published. Ours are the ids whose SHA-256 with seed and split is least: the same on every machine,
whatever the order of the files, and a smaller sample is part of a larger one. The study's data sizes are
`train_size: 1000`, `5000`, `10000`. A result names size, seed and a hash of the ids; `samples/` has the ids of the
usual sizes, and any list of ids is taken by `train_ids`.

| option | default | meaning |
|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/tasks.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    check = parser.parse_args().check
    wanted = page()
    present = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if present == wanted:
        return
    if check:
        sys.exit(f"{PAGE.name} is out of date. Run: python scripts/tasks_page.py")
    PAGE.write_text(wanted, encoding="utf-8")


def page() -> str:
    """The whole page."""
    listed = catalogue()
    options = [f"| `{each['name']}` | {each['default']} | {each['meaning']} |" for each in options_of(SampledOptions)]
    others = [name for name in TASKS if name not in {each["task"] for each in listed}]
    return "\n".join(
        [
            HEAD,
            *overview(listed),
            "",
            PREPARING + "\n".join(options),
            "",
            *seen(listed),
            *(line for each in listed for line in section(each)),
            "## Without a release",
            "",
            "| task | what it is |",
            "|---|---|",
            *(f"| `{name}` | {TASKS.summary(name)} |" for name in others),
            "",
            "Own data is described in [own-data.md](own-data.md), a new task in [add-a-task.md](add-a-task.md).",
            "",
        ]
    )


def overview(listed: list[dict[str, Any]]) -> list[str]:
    """One line each."""
    head = "| task | data set | training | scored | metric | licence |"
    rows = [
        f"| [{each['task']}](#{each['task']}) | {each['title']} | {number(each, 'train')} | {number(each, 'test')} | "
        f"`{each['metric']}` | {each['licence']} |"
        for each in listed
    ]
    return [head, "|---|---|---:|---:|---|---|", *rows]


def number(each: dict[str, Any], split: str) -> str:
    """A split's size, and its name where it is another."""
    part = each["splits"].get(split)
    if part is None:
        return "none"
    size = "not stated" if part["number"] is None else f"{part['number']:,}"
    unit = "" if part["unit"] == "questions" or part["number"] is None else f" {part['unit']}"
    return f"{size}{unit}{'' if part['official'] == split else ' (`' + part['official'] + '`)'}"


def seen(listed: list[dict[str, Any]]) -> list[str]:
    """What each model was trained on."""
    rows = [f"| {each['task']} | {' | '.join(each['seen'][model] for model in MODELS)} |" for each in listed]
    return [
        "## Seen or unseen",
        "",
        "Whether a model's own training had the data set. The study calls those that all have seen *seen*, and those",
        "that none has *unseen*. TextVQA's images are also TextCaps's, which LLaVA-1.5 has seen.",
        "",
        f"| task | {' | '.join(MODELS.values())} |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def section(each: dict[str, Any]) -> list[str]:
    """One data set."""
    name = each["task"]
    cls = TASKS[name]
    about = inspect.getdoc(sys.modules[cls.__module__]) or ""
    own = [option for option in options_of(cls.Options) if option["name"] not in SampledOptions.model_fields]
    files = ", ".join(f"`{file['file']}`" for file in each["downloads"])
    hub = f" On the hub: `{each['hub']}`." if each["hub"] else " It is on no hub in a form that is read."
    notes = [f"`{part['official']}`: {part['note']}" for part in each["splits"].values() if part["note"]]
    return [
        f"## {name}",
        "",
        f"{each['title']}. {each['paper']}. Licence: {each['licence']}.",
        "",
        "```text",
        about,
        "```",
        "",
        f"Get it ({each['size']}) from <{each['home']}>: {files}.{hub}",
        *([f"Splits: {'; '.join(notes)}."] if notes else []),
        "",
        "```bash",
        f"peft-mllm data prepare {name} --source downloads/{name}",
        f"peft-mllm evaluate embedded --task '{{name: {name}, root: datasets/{each['folder']}}}'",
        "```",
        "",
        "| `prompt` | text | tokens of an answer | source |",
        "|---|---|---:|---|",
        *(
            f"| `{key}` | `{shown(prompt.shape)}` | {prompt.max_new_tokens} | {prompt.source} |"
            for key, prompt in cls.prompts.items()
        ),
        "",
        "| option | default | meaning |",
        "|---|---|---|",
        *(f"| `{option['name']}` | {option['default']} | {option['meaning']} |" for option in own),
        "",
    ]


def shown(shape: str) -> str:
    """A prompt in one line of a table."""
    return shape.replace("\n", "\\n").replace("|", "\\|")


if __name__ == "__main__":
    main()
