"""Advice in words: no more than the figures say, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peft_mllm.study import wording
from peft_mllm.study.advise import FORGOTTEN, Advice, Limits, Option, Verdict
from peft_mllm.study.analysis import Effect
from peft_mllm.study.ledger import DISK, MEMORY, SECONDS, TRAINABLE
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.wording import GLUE, and_list, figure, interval

FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    TRAINABLE: ("trains", lambda value: wording.count(round(value))),
    DISK: ("size", lambda value: wording.size(round(value))),
    MEMORY: ("memory", lambda value: wording.size(round(value))),
    SECONDS: ("time", wording.duration),
    FORGOTTEN: ("forgot", lambda value: f"{figure(value)}{GLUE}points"),
}
"""Heading and text of each cost."""
MOST = 6
"""Names of one sentence."""


def headline(verdict: Verdict) -> str:
    """Where an answer comes from, and how sure it can be."""
    lines = len(verdict.top) + len(verdict.lower) + len(verdict.excluded)
    tasks = and_list(verdict.tasks)
    on = f"on other tasks ({tasks})" if verdict.kind == "other tasks" else f"on {tasks}"
    over = ", the mean of them" if len(verdict.tasks) > 1 else ""
    basis = [f"{lines} candidates", _many(verdict.seeds, "seed")]
    basis += [_many(verdict.questions, "question")] if verdict.questions else ["scores of whole runs alone"]
    basis += [f"protocol {text.partition(':')[0]}" for term, text in verdict.evidence.protocol if term == "protocol"]
    strength = {"direct": "Direct evidence", "other tasks": "Weaker evidence", "other model": "On another model"}
    return f"{strength[verdict.kind]}: {verdict.model} {on}{over}; {', '.join(basis)}; {verdict.evidence.place}."


def sentences(verdict: Verdict) -> Iterator[str]:
    """What may be concluded."""
    if not verdict.top and not verdict.excluded:
        yield "No candidate has the connector that was asked for."
        return
    if not verdict.top:
        yield f"None of the {len(verdict.excluded)} candidates is within the limits."
        return
    if verdict.unmeasured:
        yield "What is forgotten was not measured there, so nothing of it is known to be within the limit."
        return
    if verdict.seeds < 2:
        first = verdict.top[0]
        yield (
            f"{first.name} has the highest score, {_score(first, verdict)}, of {len(verdict.top)} with one run each. "
            "One seed tells no two methods apart: another may change the order."
        )
        return
    yield from _top(verdict)
    if all(_like_zero_shot(option) for option in verdict.top):
        yield "None of them is told apart from the model as it is, which costs nothing."
    if len(verdict.top) > 1:
        yield from _among_equals(verdict)
    if verdict.above:
        names = and_list(verdict.above, most=MOST)
        yield f"What the limits cost: told apart from {verdict.top[0].name}, and higher, is {names}."
    unknown = {name: [o.name for o in verdict.top if name in o.unknown] for name in FIGURES}
    for name, without in unknown.items():
        if without:
            yield f"Not known is the {_noun(name)} of {and_list(without, most=MOST)}; the limit excludes nothing there."
    near = [option.name for option in verdict.top if option.uncertain]
    if near:
        yield f"{and_list(near, most=MOST)} may have forgotten more than the limit, by the interval."


def _top(verdict: Verdict) -> Iterator[str]:
    first = verdict.top[0]
    within = len(verdict.top) + len(verdict.lower)
    if within == 1:
        yield f"{first.name} ({_score(first, verdict)}) is the only candidate within the limits."
    elif len(verdict.top) == 1:
        yield f"{first.name} ({_score(first, verdict)}) is best: told apart from each of {within - 1} others."
    else:
        names = [f"{option.name} ({_score(option, verdict)})" for option in verdict.top]
        yield f"{and_list(names, most=MOST)} cannot be told apart at the top of {within}."
        if verdict.lower:
            lower = and_list([option.name for option in verdict.lower], most=MOST)
            yield f"Told apart from {first.name}, and lower: {lower}."
        if verdict.apart_by is not None:
            yield (
                f"That is not equality: {first.name} may differ from another of them by up to "
                f"{figure(verdict.apart_by)}{GLUE}points."
            )


def _among_equals(verdict: Verdict) -> Iterator[str]:
    said = []
    for name, word in (
        (TRAINABLE, "trains the fewest parameters"),
        (DISK, "is the smallest on disk"),
        (MEMORY, "took the least memory"),
        (SECONDS, "was trained fastest"),
        (FORGOTTEN, "forgot least"),
    ):
        known = {option.name: value for option in verdict.top if (value := cost(option, name)) is not None}
        if len(known) == len(verdict.top) and len(set(known.values())) > 1:
            least = min(known, key=lambda each: (known[each], each))
            said.append((least, f"{word} ({FIGURES[name][1](known[least])})"))
    if said:
        names = dict.fromkeys(name for name, _ in said)
        parts = [f"{name} {and_list([w for n, w in said if n == name], most=MOST)}" for name in names]
        yield f"The score gives no reason to prefer one. Of these, {'; '.join(parts)}."


def effects_in_words(verdict: Verdict) -> Iterator[str]:
    """What factors do in the same study, pooled over all its matched cells; only what is told apart."""
    for effect in verdict.evidence.effects:
        if not effect.where and effect.p_adjusted is not None and effect.p_adjusted < 0.05:
            yield _effect(effect)


def _effect(effect: Effect) -> str:
    axis = effect.axis.replace("train.", "").replace("_", " ")
    return (
        f"{axis} {effect.low_level} to {effect.high_level}: {figure(effect.value.value, signed=True)} "
        f"({interval(effect.value, signed=True)}) over {effect.cells} matched cells."
    )


def setting_in_words(option: Option) -> str:
    """How a candidate was made, as keys of a spec."""
    own = option.setting
    options = {**({"location": own.location} if own.location else {}), **own.options}
    inner = ", ".join([f"name: {own.method}", *(f"{key}: {value}" for key, value in options.items())])
    parts = [f"method={{{inner}}}" if options else f"method={own.method}"]
    parts += [f"connector={own.connector}"] if own.connector else []
    parts += [f"vision={own.vision}"] if own.vision not in ("", "frozen") else []
    parts += [f"train.learning_rate={own.learning_rate:g}"] if own.learning_rate else []
    return " ".join(parts)


def exclusions(verdict: Verdict, limits: Limits) -> Iterator[str]:
    """Who breaks which limit, by how much."""
    most = dict(limits.known())
    for option in verdict.excluded:
        broken = [
            f"{_noun(name)} {_apart(name, value, most[name])}"
            for name in option.exceeds
            if (value := cost(option, name)) is not None
        ]
        yield f"{option.name}: {and_list(broken)}"


def _apart(name: str, value: float, limit: float) -> str:
    """A figure and the limit that it breaks, with as many digits as it takes to see that."""
    said, most = FIGURES[name][1](value), FIGURES[name][1](limit)
    digits = 1
    while said == most and digits < 12:
        shown = ",.0f" if _UNITS[name] == "bytes" else f".{digits}f"
        said, most = (f"{each:{shown}}{GLUE}{_UNITS[name]}" for each in (value, limit))
        digits += 1
    return f"{said} > {most}"


_UNITS = {FORGOTTEN: "points", DISK: "bytes", MEMORY: "bytes", SECONDS: "s"}


def all_beyond(advice: Advice) -> str:
    """Before an answer: that of the model and task itself all that was measured of what is limited is beyond it."""
    own = [*([advice.verdict] if advice.verdict else []), *advice.others]
    direct = [each for each in own if each.kind == "direct"]
    count = sum(len(each.excluded) for each in direct)
    known = any(not option.unknown for each in direct for option in (*each.top, *each.lower))
    if not advice.verdict or not count or known:
        return ""
    return (
        f"Of {advice.model} on {advice.task}, all {count} candidates whose limited figures are known are beyond the "
        "limits; what follows rests on others."
    )


def cost(option: Option, name: str) -> float | None:
    """One of `FIGURES`; None where it is not known."""
    if name == FORGOTTEN:
        return option.forgotten.value if option.forgotten else None
    return option.figures.get(name)


def device(verdict: Verdict) -> str:
    """On what time and memory were measured."""
    found = dict.fromkeys(
        option.setting.device for option in (*verdict.top, *verdict.excluded) if option.setting.device
    )
    return and_list(list(found))


def what_is_missing(advice: Advice) -> str:
    """Why there is no answer, or why a better one could be had."""
    of = f"{advice.model} on {advice.task}"
    own = [*([advice.verdict] if advice.verdict else []), *advice.others]
    direct = [each for each in own if each.kind == "direct"]
    if advice.verdict and advice.verdict.kind == "direct":
        return ""
    if advice.verdict:
        return f"There is no direct evidence of {of}, with several seeds and within the limits."
    if direct and all(each.seeds < 2 and each.top for each in direct):
        return f"Evidence is missing: there is one seed of {of}, and that tells no two methods apart."
    if any(each.unmeasured for each in own):
        places = and_list([each.evidence.place for each in own if each.unmeasured], most=MOST)
        return f"Evidence is missing: what is forgotten was not measured in {places}."
    if any(not each.top for each in own):
        return f"Evidence is missing: nothing that was measured of {of} is within the limits."
    if own:
        return f"Evidence is missing: of {advice.model} there is one seed, on other tasks than {advice.task}."
    if advice.elsewhere:
        return f"Evidence is missing: there is none of {advice.model}. Other models say nothing sure about it."
    return f"Evidence is missing: there is no study of {advice.model}."


def score_in_words(option: Option) -> str:
    """A score with its interval."""
    limits = interval(option.score)
    return figure(option.score.value) + (f" ({limits})" if limits else "")


def gain_in_words(found: Estimate | None) -> str:
    """A difference with its interval."""
    if found is None:
        return wording.NOTHING
    limits = interval(found, signed=True)
    return figure(found.value, signed=True) + (f" ({limits})" if limits else "")


def brief(verdict: Verdict) -> str:
    """A further verdict in one line."""
    said = next(iter(sentences(verdict)), "")
    return f"{headline(verdict)} {said}"


def runs_in_words(option: Option, *, most: int = 3) -> str:
    """The runs that a candidate's figures come from; of many the first, and how many more."""
    more = len(option.runs) - most
    return ", ".join(option.runs[:most]) + (f" and {more} more" if more > 0 else "")


def _score(option: Option, verdict: Verdict) -> str:
    unit = verdict.evidence.unit
    return figure(option.score.value) + (f"{GLUE}{unit}" if unit else "")


def _like_zero_shot(option: Option) -> bool:
    gain = option.gain
    return gain is not None and gain.low is not None and gain.high is not None and gain.low <= 0 <= gain.high


def _many(count: int, what: str) -> str:
    return f"{count}{GLUE}{what}{'' if count == 1 else 's'}"


def _noun(name: str) -> str:
    return {TRAINABLE: "number of parameters", DISK: "size", SECONDS: "time", FORGOTTEN: "loss on seen tasks"}.get(
        name, name
    )
