"""The study that would give missing evidence: a shipped one, cut down to one model and task by overrides.

The embedded base and the tiny models take the tiny twin, whose sizes and rates fit them; all others the paper's
values. Three seeds in both: fewer tell no two methods apart.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from peft_mllm.document import SHORT_FORMS
from peft_mllm.errors import SpecError
from peft_mllm.shelf import did_you_mean
from peft_mllm.study.advise import same_model, same_task
from peft_mllm.study.definition import Study, load_study
from peft_mllm.tasks import TASKS

SEEDS = [1, 2, 3]
TINY, WHOLE = "main-tiny.yaml", "main.yaml"
FOLDERS = (Path("studies"), Path(__file__).resolve().parents[3] / "studies")
"""Where the shipped studies are: below where one works, or in the source from which the package runs."""
SMALL = {
    "by": "method",
    "lora": {"rank": [1, 4]},
    "adapter": {"bottleneck": [2, 8]},
    "prefix": {"virtual_tokens": [2, 8]},
}
SIZE = {"train": 1024, "validation": 192, "test": 256}
"""Of a generated task, as the tiny studies have it."""


@dataclass(frozen=True)
class Suggestion:
    """A study to run.

    Attributes:
        file: of the shipped study.
        overrides: that make it the one needed.
        note: what the person has to see to first; may be empty.
    """

    file: Path
    overrides: tuple[str, ...]
    note: str = ""

    def command(self, verb: str) -> str:
        """A line for a shell."""
        return shlex.join(["peft-mllm", "study", verb, self.file.as_posix(), *self.overrides])


def suggestion(model: str, task: str, *, smaller: bool = False) -> Suggestion | None:
    """The study for a model and task; None for a task that is not on the shelf.

    Args:
        model: directory or hub id.
        task: name on the tasks shelf, or a shipped study's label.
        smaller: whether methods are tried in small sizes, too.
    """
    tiny = model == "embedded" or model.startswith("tiny:")
    shipped = TINY if tiny else WHOLE
    file = next((found for each in FOLDERS if (found := each / shipped).is_file()), None)
    study = None if file is None else load_study(file)
    label, value = _task(task, study)
    name = value["name"]
    if name not in TASKS:
        return None
    said: dict[str, Any] = {"axes.task": {label: value}}
    if tiny:
        said |= {"fixed.model": model} if model != "embedded" else {}
        said |= {"search.on": {"task": label}}
    else:
        said |= {
            "axes.model": dict([_model(model, study)]),
            "axes.connector": ["frozen", "tuned"],
            "axes.seed": SEEDS,
            "exclude": [],
        }
    if smaller:
        said["axes.size"] = SMALL
    small = "-small" if smaller else ""
    said["output_dir"] = f"runs/studies/{_plain(model)}-{_plain(label)}{small}"
    notes = [] if file else ["studies/ is a folder of the project's source."]
    if "root" in value:
        notes.append(f"`peft-mllm data prepare {name}` makes {value['root']}.")
    if not tiny:
        notes.append(
            "For what is forgotten it asks data/okvqa, data/ocrvqa and data/vqav2, too; fixed.evaluate=[] asks none."
        )
    if name == "custom":
        notes.append("Put your files in place of train.jsonl, validation.jsonl and test.jsonl.")
    overrides = tuple(f"{key}={_flow(each)}" for key, each in said.items())
    return Suggestion(file or FOLDERS[0] / shipped, overrides, " ".join(notes))


def known_model(model: str, names: Sequence[str]) -> None:
    """Refuse a word that is nearly a model's name and none itself; a hub id or a directory may be any.

    Raises:
        SpecError: names the nearest.
    """
    known = list(dict.fromkeys(["embedded", *names]))
    if "/" in model or Path(model).is_dir() or any(same_model(model, each, "") for each in known):
        return
    if near := difflib.get_close_matches(model, known, n=1, cutoff=0.8):
        raise SpecError(f"--model {model}: there is no such model. Did you mean '{near[0]}'?")


def known_task(task: str, labels: Sequence[str]) -> None:
    """Refuse a task that is neither on the shelf nor in any evidence.

    Raises:
        SpecError: names the nearest.
    """
    known = list(dict.fromkeys([*TASKS, *labels]))
    if not any(same_task(task, each, "") for each in known):
        raise SpecError(f"--task {task}: there is no such task. {did_you_mean(task, known)}")


def _task(task: str, study: Study | None) -> tuple[str, dict[str, Any]]:
    """The label and value of the task's axis: the shipped study's own where it has the task."""
    said = study.axes["task"] if study else {}
    for label, value in said.items() if isinstance(said, Mapping) else ():
        if same_task(task, str(value["name"]), str(label)):
            return str(label), dict(value)
    name = next((each for each in TASKS if same_task(task, each, "")), task)
    if name == "custom":
        return name, {"name": name, "train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    if name in TASKS and "root" in TASKS[name].Options.model_fields:
        return name, {"name": name, "root": f"data/{name}"}
    return name, {"name": name, "size": SIZE, "seed": 1}


def _model(model: str, study: Study | None) -> tuple[str, Any]:
    """The label and value of the model's axis: the shipped study's own for one of its models, word for word."""
    said = study.axes.get("model", {}) if study else {}
    for label, value in said.items() if isinstance(said, Mapping) else ():
        inner = value.get("model", value) if isinstance(value, Mapping) else value
        path = inner.get(SHORT_FORMS["model"], "") if isinstance(inner, Mapping) else inner
        if model in (str(path), str(label)) and not Path(model).is_dir():
            return str(label), value
    return PurePath(model).name or model, model


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(name).name).strip("-.") or "study"


def _flow(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
