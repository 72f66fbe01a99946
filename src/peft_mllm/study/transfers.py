"""Trained on one task, scored on others: at the end, and at the scored points of the training curve.

Zhou et al. 2024 (arXiv 2406.05130), section 5.5: what overfitting on the source costs on a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft_mllm.study.analysis import Transfer
from peft_mllm.study.outcomes import NOT_VARIED
from peft_mllm.study.overview import Row
from peft_mllm.study.pairing import Group, group_at, points_of


def transfers_of(rows: Sequence[Row], tasks: Sequence[str], seen: Sequence[str]) -> tuple[Transfer, ...]:
    """Every line's scores on the tasks it was not trained on.

    Args:
        rows: lines of the study; zero-shot is no source.
        tasks: of the study's axis, in order.
        seen: tasks that only measure what was forgotten; they are targets where they are trained on too.
    """
    return tuple(found for row in rows for found in _of(row, tasks, seen))


def _of(row: Row, tasks: Sequence[str], seen: Sequence[str]) -> Iterator[Transfer]:
    if row.is_zero_shot:
        return
    scored = list(dict.fromkeys(task for outcome in row.cell.outcomes for task in outcome.scores))
    targets = [task for task in [*tasks, *(task for task in scored if task not in tasks)] if task in scored]
    targets = [task for task in targets if task != row.task and (task in tasks or task not in seen)]
    count = points_of(row.cell)
    for target in targets:
        before = row.base.on(target) if row.base else None
        for point in (None, *range(count)):
            group = row.on(target) if point is None else group_at(row.cell, target, point)
            if group is not None:
                yield _transfer(row, target, point, group, before)


def _transfer(row: Row, target: str, point: int | None, group: Group, before: Group | None) -> Transfer:
    return Transfer(
        factors={axis: label for axis, label in row.cell.factors.items() if label != NOT_VARIED},
        source=row.task,
        target=target,
        point=point,
        value=group.interval(),
        change=float(group.values.mean() - before.values.mean()) if before else None,
    )
