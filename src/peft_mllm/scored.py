"""One opened split, asked and scored: its entry of result.json, and its predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_mllm.evaluation import evaluate
from peft_mllm.files import file_digest, write_lines
from peft_mllm.rundir import PREDICTIONS
from peft_mllm.screen import Screen
from peft_mllm.spec import Spec
from peft_mllm.splits import Opened
from peft_mllm.tuned import Tuned
from peft_mllm.world import World


def score(
    asked: Opened,
    tuned: Tuned,
    spec: Spec,
    *,
    world: World,
    screen: Screen,
    stop: Callable[[], bool] = lambda: False,
    directory: Path | None = None,
    identity: str = "",
    folder: str = PREDICTIONS,
) -> dict[str, Any]:
    """Evaluate one task.

    Args:
        asked: the task's opened split.
        tuned: the model.
        spec: generation, batch size and seed.
        world: the processes, which share the questions.
        screen: where progress is shown.
        stop: polled between batches.
        directory: its predictions go below it, as they come; what is there already is not asked again.
        identity: a fingerprint of the model with its adapter, without which nothing is taken from `directory`.
        folder: for predictions, in `directory`.

    Raises:
        Interrupted: somebody asked to stop.
    """
    path = directory / folder / f"{asked.name}.jsonl" if directory else None
    with screen.bar(f"asking {asked.name}", len(asked.records)) as bar:
        outcome = evaluate(
            tuned,
            asked.records,
            metric=asked.task.metric,
            max_new_tokens=asked.task.max_new_tokens,
            generation=spec.generation,
            batch_size=spec.train.per_device_eval_batch_size,
            seed=spec.seed,
            world=world,
            identity=identity,
            path=path if identity else None,
            report=bar.advance,
            note=screen.note,
            stop=stop,
        )
    summary: dict[str, Any] = {"split": asked.split, **outcome.summary(), "predictions": None}
    if asked.source != asked.split:
        summary["held_out_of"] = asked.source
    if asked.report:
        counts = {"read": asked.report.read, "used": asked.report.used, "quarantined": asked.report.quarantined}
        summary["data"] = counts | {"findings": dict(asked.report.counts)}
    origin = asked.task.origin(asked.source)
    summary |= {"origin": dict(origin)} if origin else {}
    if directory is not None and path is not None:
        if world.is_main:
            write_lines(path, outcome.lines(), what="the predictions")
        digest = world.share(file_digest(path) if world.is_main else "")
        summary |= {"predictions": str(path.relative_to(directory)), "predictions_sha256": digest}
    headline, value = next(iter(outcome.scores.values.items()))
    unparsed = f", {outcome.scores.unparsed} not understood" if outcome.scores.unparsed else ""
    resumed = f", {outcome.resumed} of them answered before" if outcome.resumed else ""
    screen.note(f"{asked.name}: {headline} {value:.2f} on {len(asked.records)} questions{resumed}{unparsed}")
    return summary
