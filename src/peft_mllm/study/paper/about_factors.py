"""Claims on what a setting does: connector, size, location, data, vision tower."""

from __future__ import annotations

from peft_mllm.study.paper.evidence import (
    Contrast,
    Finding,
    all_above,
    contrast,
    negligible,
    no_gain,
    nothing,
    together,
)
from peft_mllm.study.paper.groups import Group
from peft_mllm.study.paper.matching import (
    Evidence,
    ends,
    in_order,
    methods_of,
    minus,
    pairs,
    seen_by,
    split_by,
    trained_task,
    unseen_by,
)
from peft_mllm.study.paper.names import LOCATIONS

_TENTH = 1.1
"""The paper's `>10%` is of the score itself: its adapter's 8.2 points from 61.6 are 13 %."""


def connector_helps(study: Evidence) -> Finding:
    """Claim 4: tuning the connector raises the score on unseen tasks."""
    cells = minus(pairs(study.groups, "connector", ("tuned",), "frozen"))
    return all_above([contrast("connector tuned minus frozen", cells, unseen_by(study.seen))])


def frozen_is_best(study: Evidence) -> Finding:
    """Claim 5: freezing the connector is best on seen tasks."""
    if not study.seen:
        return nothing()
    cells = minus([(second, first) for first, second in pairs(study.groups, "connector", ("tuned",), "frozen")])
    tasks, words = seen_by(study.seen, study.groups)
    return all_above([contrast(f"connector frozen minus tuned, {words}", cells, tasks)])


def size_matters(study: Evidence) -> Finding:
    """Claim 6: within a method more parameters are better on unseen tasks, and fewer on seen ones."""
    largest = ends(study.groups, "size", also=("parameters",))
    smallest = [(second, first) for first, second in largest]
    tasks, words = seen_by(study.seen, study.groups)
    unseen = contrast("largest minus smallest on unseen tasks", minus(largest), unseen_by(study.seen))
    seen = contrast(f"smallest minus largest {words}", minus(smallest), tasks)
    return together([all_above([unseen]), all_above([seen])])


def best_location(study: Evidence) -> Finding:
    """Claim 7: LoRA and IA3 do best at attention and MLP, adapter at the MLP alone."""
    found: list[Contrast | None] = []
    for method in methods_of(study.groups):
        if (best := LOCATIONS.get(method)) is None:
            continue
        groups = [group for group in study.groups if group.method == method]
        for other in ("attention", "mlp", "both"):
            if other != best:
                cells = minus(pairs(groups, "location", (best,), other))
                found.append(contrast(f"{method}: {best} minus {other}", cells, trained_task))
    return all_above(found)


def most_data_is_best(study: Evidence) -> Finding:
    """Claim 8: every method is best with most data; the first step up gains over 10 %, and more than the last."""
    found: list[Contrast | None] = []
    for method in methods_of(study.groups):
        levels = _data(study, method)
        for below in (0, 1):
            cells = [((1.0, each[-1]), (-1.0, each[below])) for each in levels if len(each) > below + 1]
            found.append(contrast(f"{method}: most data minus {_ORDINALS[below]}", cells, trained_task))
        low = [((1.0, each[1]), (-_TENTH, each[0])) for each in levels if len(each) > 2]
        found.append(contrast(f"{method}: medium minus 1.1 of low", low, trained_task))
        bend = [((2.0, each[1]), (-1.0, each[0]), (-1.0, each[-1])) for each in levels if len(each) > 2]
        found.append(contrast(f"{method}: first step minus last", bend, trained_task))
    return all_above(found)


def unseen_gain_from_data(study: Evidence) -> Finding:
    """Claim 9: more data raises the score on unseen tasks, and does nothing on seen ones."""
    cells = minus(ends(study.groups, "data_size"))
    tasks, words = seen_by(study.seen, study.groups)
    unseen = contrast("most minus least data on unseen tasks", cells, unseen_by(study.seen))
    return together([all_above([unseen]), negligible(contrast(f"most minus least data {words}", cells, tasks))])


def tower_does_not_help(study: Evidence) -> Finding:
    """Claim 15: unfreezing the vision tower gains nothing."""
    cells = minus(pairs(study.groups, "vision", ("tuned",), "frozen"))
    return no_gain(contrast("vision tower tuned minus frozen", cells, trained_task))


_ORDINALS = ("least", "second least")


def _data(study: Evidence, method: str) -> list[list[Group]]:
    """Groups of one method that differ in the size of the data, the smallest first."""
    groups = [group for group in study.groups if group.method == method]
    return [in_order(levels) for levels in split_by(groups, "data_size")]
