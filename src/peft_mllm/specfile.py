"""Reading a spec from YAML and the command line, with errors that name file, line and key.

spec = load_spec("run.yaml", ["train.learning_rate=1e-4", "method.rank=16"])
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
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


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply overrides.

    Raises:
        SpecError: everything that is wrong, each with file, line and key.
    """
    return _validate(read_document(path, "spec"), overrides)


def parse_value(text: str, place: str) -> Any:
    """A value that was written as YAML outside a file, such as `--task '{name: custom, test: my.jsonl}'`."""
    return Document("", said(f"{place} {text}")).read(text, ())


def parse_spec(data: Mapping[str, Any] | Spec, overrides: Sequence[str] = ()) -> Spec:
    """A spec from Python data, checked like a file's; for notebooks."""
    if isinstance(data, Spec):
        data = data.model_dump(mode="json")
    try:
        text = json.dumps(data, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise SpecError(f"The spec holds something that YAML cannot say: {error}.") from error
    return _validate(Document.of(json.loads(text), "spec"), overrides)


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
