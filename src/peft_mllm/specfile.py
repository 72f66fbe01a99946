"""Reading a spec from YAML and the command line, with errors that name file, line and key.

spec = load_spec("run.yaml", ["train.learning_rate=1e-4", "method.rank=16"])
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peft_mllm.document import Document, Key, read_document, said, sentences, validated
from peft_mllm.errors import SpecError
from peft_mllm.methods import METHODS
from peft_mllm.metrics import no_metric
from peft_mllm.models import MODELS
from peft_mllm.shelf import Shelf, did_you_mean
from peft_mllm.spec import NamedSpec, Spec
from peft_mllm.tasks import TASKS

RESULT = "result.json"
OF_A_RUN = ("spec.json", RESULT)
"""Files of a run's directory that say its spec."""


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply overrides.

    Raises:
        SpecError: everything that is wrong, each with file, line and key.
    """
    if Path(path).is_dir():
        raise SpecError(f"{path} is a directory. Give a spec file, such as run.yaml.")
    return _validate(read_document(path, "spec"), overrides)


def load_spec_of(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The spec of a file, or of a run: its directory, its `spec.json` or its `result.json`.

    Raises:
        SpecError: everything that is wrong, each with file, line and key.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in OF_A_RUN if (file / name).is_file()]
        if not found:
            said = " or ".join(OF_A_RUN)
            raise SpecError(f"{path} is a directory without {said}. Give a spec file, or the directory of a run.")
        file = found[0]
    document = read_document(file, "spec")
    if file.name == RESULT and isinstance(document.data.get("spec"), dict):
        document = Document.of(document.data["spec"], str(file))
    if file.name in OF_A_RUN:
        document.data.setdefault("output_dir", str(file.parent))  # a run's spec leaves it out: it may be moved
        for key in document.data.keys() & {"method", "task"}:
            document.data[key] = _as_written(document.data[key])
    return _validate(document, overrides)


def _as_written(named: Any) -> Any:
    """A name with its options as a person writes it, so that an override finds an option where a file has it."""
    if isinstance(named, dict) and isinstance(named.get("options"), dict):
        return {"name": named.get("name"), **named["options"]}
    return named


def parse_value(text: str, place: str) -> Any:
    """A value that was written as YAML outside a file, such as `--task '{name: custom, test: my.jsonl}'`."""
    return Document("", said(f"{place} {text}")).read(text, ())


def parse_spec(
    data: Mapping[str, Any] | Spec, overrides: Sequence[str] = (), *, place: Callable[[Key], str] | None = None
) -> Spec:
    """A spec from Python data, checked like a file's; for notebooks.

    Args:
        data: as a file would say it.
        overrides: as on the command line.
        place: where a key was said, for data that was put together from a file.
    """
    if isinstance(data, Spec):
        data = data.model_dump(mode="json")
    try:
        text = json.dumps(data, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise SpecError(f"The spec holds something that YAML cannot say: {error}.") from error
    document = Document.of(json.loads(text), "spec") if place is None else _Composed(json.loads(text), place)
    return _validate(document, overrides)


class _Composed(Document):
    """Data whose keys were said in another document."""

    def __init__(self, data: dict[str, Any], place: Callable[[Key], str]) -> None:
        super().__init__("", "spec")
        self.data, self._place = data, place

    def place(self, key: Key) -> str:
        """Where the other document says it."""
        return self._place(key)


def _validate(document: Document, overrides: Sequence[str]) -> Spec:
    for assignment in overrides:
        document.override(assignment)
    spec = validated(document, Spec)
    if spec.model.family is not None and spec.model.family not in MODELS:
        known = did_you_mean(spec.model.family, list(MODELS))
        place = document.place(("model", "family"))
        raise SpecError(f"{place}: there is no model family '{spec.model.family}'. {known}")
    problems = [problem for key, named, shelf in _named(spec) for problem in _problems(key, named, shelf, document)]
    if problems:
        raise SpecError("\n".join(problems))
    return spec.model_copy(
        update={
            "method": _complete(METHODS, spec.method),
            "task": _complete(TASKS, spec.task),
            "evaluate": tuple(_complete(TASKS, task) for task in spec.evaluate),
        }
    )


def _complete(shelf: Shelf[Any], named: NamedSpec) -> NamedSpec:
    """With every option said, so that options given as their defaults are the same run."""
    return NamedSpec(name=named.name, options=validated_options(shelf, named).model_dump(mode="json"))


def _named(spec: Spec) -> Iterator[tuple[Key, NamedSpec, Shelf[Any]]]:
    yield ("method",), spec.method, METHODS
    yield ("task",), spec.task, TASKS
    for i, task in enumerate(spec.evaluate):
        yield ("evaluate", i), task, TASKS


def _problems(key: Key, named: NamedSpec, shelf: Shelf[Any], document: Document) -> list[str]:
    """What is wrong with a name and its options, in sentences."""
    if named.name not in shelf:
        known = did_you_mean(named.name, list(shelf))
        return [f"{document.place((*key, 'name'))}: there is no {shelf.kind} '{named.name}'. {known}"]
    try:
        options = validated_options(shelf, named)
    except ValidationError as error:
        return list(sentences(error, shelf[named.name].Options, document, key))
    metric = getattr(options, "metric", None)  # some tasks let the user choose
    problem = no_metric(metric) if metric is not None else None
    if problem:
        return [f"{document.place((*key, 'metric'))}: {problem[0].lower()}{problem[1:]}"]
    return []


def validated_options(shelf: Shelf[Any], named: NamedSpec) -> Any:
    """The options of a named thing, as its class's typed `Options`."""
    return shelf[named.name].Options.model_validate_json(json.dumps(dict(named.options)), strict=True)


def build(shelf: Shelf[Any], named: NamedSpec) -> Any:
    """The instance that a spec's name and options stand for."""
    try:
        return shelf[named.name](validated_options(shelf, named))
    except ValidationError as error:
        document = Document("", f"{shelf.kind} {named.name}")
        raise SpecError("\n".join(sentences(error, shelf[named.name].Options, document, ()))) from None
