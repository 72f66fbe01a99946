"""What the figures come from: runs, models, data, versions and devices, gathered from the result files."""

from __future__ import annotations

from collections.abc import Iterable

from peft_mllm.study import wording
from peft_mllm.study.results import Result, Source
from peft_mllm.study.view import View


def facts(view: View) -> list[tuple[str, str]]:
    """At a glance, for the head of the page."""
    analysis = view.analysis
    results = _results(view)
    pairs = [
        ("runs", f"{len(analysis.outcomes):,}" + (f", {analysis.missing:,} to come" if analysis.missing else "")),
        ("model", _some(result.model.source for result in results)),
        ("seeds", str(view.seeds or "")),
        ("tasks", wording.and_list(view.labels("task"), most=5)),
        ("seen tasks", wording.and_list(analysis.seen, most=5)),
    ]
    return [(name, text) for name, text in pairs if text]


def provenance(view: View) -> list[tuple[str, str]]:
    """Each with all its values: where there are two, the runs do not share it."""
    results = _results(view)
    pairs = [
        ("model", _some(f"{result.model.source} {result.model.fingerprint[:16]}".strip() for result in results)),
        *(
            (f"data of {task}", _some(source.fingerprint[:16] for source in sources))
            for task, sources in _sources(results).items()
        ),
        *(
            (name, _some(str(result.environment[name]) for result in results if name in result.environment))
            for name in dict.fromkeys(name for result in results for name in result.environment)
        ),
    ]
    return [(name, text) for name, text in pairs if text]


def _sources(results: Iterable[Result]) -> dict[str, list[Source]]:
    found: dict[str, list[Source]] = {}
    for result in results:
        for source in result.data.values():
            found.setdefault(source.task, []).append(source)
    return found


def _results(view: View) -> list[Result]:
    return [outcome.result for outcome in view.analysis.outcomes if outcome.result]


def _some(texts: Iterable[str]) -> str:
    return wording.and_list(list(dict.fromkeys(text for text in texts if text)), most=5)
