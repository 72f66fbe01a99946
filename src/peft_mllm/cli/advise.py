"""The verb that answers which method to take, from result files. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from peft_mllm.cli.say import Json, console, example, say_json
from peft_mllm.errors import SpecError

if TYPE_CHECKING:
    from peft_mllm.study.advise import Advice, Verdict
    from peft_mllm.study.suggest import Suggestion

verbs = typer.Typer()

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@verbs.command(
    epilog=example(
        "peft-mllm advise --model embedded --task scenes_next",
        "peft-mllm advise --model llava-hf/llava-1.5-7b-hf --task vizwiz --max-memory 24GB --max-size 50MB",
        "peft-mllm advise --model my-model --task my-task --results results.csv --max-forgotten 5 --json",
    )
)
def advise(
    model: Annotated[str, typer.Option(help="Directory or hub id, or a study's name of it.")],
    task: Annotated[str, typer.Option(help="Name of the task, or a study's label of it.")],
    max_memory: Annotated[str | None, typer.Option(help="Of training at its peak: 24GB (a bare number is GB).")] = None,
    max_size: Annotated[str | None, typer.Option(help="Of the saved adapter: 50MB (a bare number is MB).")] = None,
    max_time: Annotated[str | None, typer.Option(help="Of training: 90min, 2h.")] = None,
    max_forgotten: Annotated[float | None, typer.Option(help="Points lost on seen tasks.")] = None,
    connector: Annotated[str | None, typer.Option(help="frozen or tuned; either if left out.")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of runs, or table; all studies in runs/ and what is shipped if left out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which methods cannot be told apart at the top within limits, how sure that is, and from which runs.

    Exits with 1 where the evidence is missing, and says which study would give it.
    """
    from peft_mllm.study.advise import Limits
    from peft_mllm.study.advise import advise as answer
    from peft_mllm.study.sources import gathered
    from peft_mllm.study.suggest import known_model, known_task

    if connector not in (None, "frozen", "tuned", "released"):
        raise SpecError(f"--connector {connector}: there are frozen, tuned and released.")
    limits = Limits(
        memory=_bytes("--max-memory", max_memory, "g"),
        disk=_bytes("--max-size", max_size, "m"),
        seconds=_seconds(max_time),
        forgotten=max_forgotten,
        connector=connector or "",
    )
    evidence, notes = gathered(results or ())
    known_model(model, [name for each in evidence for name in each.models()])
    known_task(task, [label for each in evidence for choice in each.choices for label in choice.tasks])
    advice = answer(evidence, model, task, limits)
    study = _study(advice, model, task)
    if as_json:
        say_json(_as_json(advice, study, notes))
    else:
        _show(advice, study, notes)
    if advice.verdict is None:
        raise typer.Exit(1)


def _study(advice: Advice, model: str, task: str) -> Suggestion | None:
    """The study that would give what is missing; None where nothing is, or where no study of ours would."""
    from peft_mllm.study.advise import FORGOTTEN
    from peft_mllm.study.ledger import DISK
    from peft_mllm.study.suggest import suggestion

    if advice.verdict is not None and advice.verdict.kind == "direct":
        return None
    beyond = [each for each in advice.others if each.kind == "direct" and not each.top and each.seeds > 1]
    broken = {name for each in beyond for option in each.excluded for name in option.exceeds}
    if not broken:
        return suggestion(model, task)
    return suggestion(model, task, smaller=True) if broken <= {DISK, FORGOTTEN} else None


# --- limits ---


def _bytes(option: str, text: str | None, usual: str) -> float | None:
    if text is None:
        return None
    found = _QUANTITY.fullmatch(text.strip())
    unit = found[2].lower().removesuffix("b") if found else ""
    if not found or unit not in _BYTES:
        raise SpecError(f"{option} {text}: write a number with kB, MB, GB, TB or MiB, GiB, such as 24GB.")
    return float(found[1]) * _BYTES[unit if found[2] else usual]


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = _QUANTITY.fullmatch(text.strip())
    if not found or found[2].lower() not in _SECONDS:
        raise SpecError(f"--max-time {text}: write a number with s, min, h or d, such as 90min.")
    return float(found[1]) * _SECONDS[found[2].lower()]


# --- for people ---


def _show(advice: Advice, study: Suggestion | None, notes: list[str]) -> None:
    from peft_mllm.study.advising import all_beyond, brief, what_is_missing

    if said := all_beyond(advice):
        _say(said)
    if advice.verdict:
        _show_verdict(advice.verdict, advice)
    if missing := what_is_missing(advice):
        _say(missing)
    for each in advice.others:
        if each.kind == "direct" and not each.top:
            _show_exclusions(each, advice)
    for title, verdicts in (("Also measured:", advice.others), ("On other models, no answer here:", advice.elsewhere)):
        if verdicts:
            _say(title)
        for each in verdicts[:3]:
            _say(f"  {brief(each)}")
    if study is not None:
        _say("This study would give it; first its cost, then its runs:")
        _say(f"  {study.command('plan')}")
        _say(f"  {study.command('run')}")
        if study.note:
            _say(f"  {study.note}")
    for note in notes:
        _say(f"Note: {note}")


def _show_verdict(verdict: Verdict, advice: Advice) -> None:
    from peft_mllm.study.advising import device, effects_in_words, headline, runs_in_words, sentences, setting_in_words
    from peft_mllm.study.evidence import SHIPPED

    _say(headline(verdict))
    for sentence in sentences(verdict):
        _say(sentence)
    _show_scores(verdict)
    where = f" ({SHIPPED})" if verdict.evidence.place.endswith(SHIPPED) else ""
    _say(f"How they were made, and the runs{where}:")
    for option in verdict.top:
        _say(f"  {option.name}: {setting_in_words(option)}")
        _say(f"    {runs_in_words(option)}")
    _show_exclusions(verdict, advice)
    effects = list(effects_in_words(verdict))
    if effects:
        _say("In the same study, all else equal:")
    for line in effects:
        _say(f"  {line}")
    if measured := device(verdict):
        _say(f"Time and memory were measured on {measured}; on other devices they differ.")
    if unfinished := verdict.evidence.missing:
        _say(f"That study is not finished: {unfinished} of its runs have no result yet.")


def _show_exclusions(verdict: Verdict, advice: Advice) -> None:
    from peft_mllm.study.advising import exclusions
    from peft_mllm.study.wording import and_list

    if verdict.excluded:
        _say(f"Beyond the limits ({verdict.model} on {and_list(verdict.tasks)}; {verdict.evidence.place}):")
    for line in exclusions(verdict, advice.limits):
        _say(f"  {line}")


def _show_scores(verdict: Verdict) -> None:
    """Two tables, since one would be too wide for a terminal."""
    from peft_mllm.study.advising import FIGURES, cost, gain_in_words, score_in_words
    from peft_mllm.study.wording import NOTHING

    unit = f" ({verdict.evidence.unit})" if verdict.evidence.unit else ""
    scores, costs = (Table(box=None, padding=(0, 2, 0, 0)) for _ in range(2))
    for heading in ("", f"score{unit}", "over zero-shot"):
        scores.add_column(heading)
    shown = [name for name in FIGURES if any(cost(option, name) is not None for option in verdict.top)]
    for heading in ("", *(FIGURES[name][0] for name in shown)):
        costs.add_column(heading)
    for option in verdict.top:
        scores.add_row(escape(option.name), score_in_words(option), gain_in_words(option.gain))
        known = [(name, cost(option, name)) for name in shown]
        said = [NOTHING if value is None else FIGURES[name][1](value) for name, value in known]
        costs.add_row(escape(option.name), *said)
    console.print(scores)
    if shown:
        console.print(costs)


def _say(line: str) -> None:
    console.print(line, markup=False)


# --- for programs ---


def _as_json(advice: Advice, study: Suggestion | None, notes: list[str]) -> dict[str, Any]:
    from dataclasses import asdict

    from peft_mllm.study.advising import what_is_missing

    return {
        "model": advice.model,
        "task": advice.task,
        "limits": asdict(advice.limits),
        "answer": _verdict_as_json(advice.verdict) if advice.verdict else None,
        "also": [_verdict_as_json(each) for each in advice.others],
        "on_other_models": [_verdict_as_json(each) for each in advice.elsewhere],
        "missing": what_is_missing(advice),
        "study": {"plan": study.command("plan"), "run": study.command("run"), "note": study.note} if study else None,
        "notes": notes,
    }


def _verdict_as_json(verdict: Verdict) -> dict[str, Any]:
    from dataclasses import asdict

    from peft_mllm.study.advising import headline, sentences

    return {
        "kind": verdict.kind,
        "model": verdict.model,
        "tasks": verdict.tasks,
        "from": verdict.evidence.place,
        "study": verdict.evidence.title,
        "protocol": dict(verdict.evidence.protocol),
        "seeds": verdict.seeds,
        "questions": verdict.questions,
        "unfinished": verdict.evidence.missing,
        "basis": headline(verdict),
        "conclusion": list(sentences(verdict)),
        "cannot_be_told_apart": [asdict(option) for option in verdict.top],
        "told_apart_and_lower": [asdict(option) for option in verdict.lower],
        "beyond_the_limits": [asdict(option) for option in verdict.excluded],
        "difference_not_ruled_out": verdict.apart_by,
    }
