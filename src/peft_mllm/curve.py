"""The training curve: which checkpoints are scored like the run's end, and their scores.

Zhou et al. 2024 (arXiv 2406.05130), section 5.5: from the evaluation of lowest validation loss on, the evaluations
after it are the points of overfitting; each is scored on the other tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_mllm.fitting import Fitted
from peft_mllm.identity import identity_of
from peft_mllm.progress import Progress
from peft_mllm.rundir import PREDICTIONS, RunDir
from peft_mllm.scored import score
from peft_mllm.screen import Screen
from peft_mllm.spec import Spec
from peft_mllm.splits import Opened
from peft_mllm.training import load_parameters
from peft_mllm.tuned import Tuned
from peft_mllm.world import World


def score_curve(
    fitted: Fitted,
    tuned: Tuned,
    spec: Spec,
    questions: Sequence[Opened],
    final: Mapping[str, Any],
    *,
    base: str,
    run: RunDir,
    world: World,
    screen: Screen,
    stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Score the checkpoints that the spec asks for; the model is left with the weights of the last of them.

    Args:
        fitted: the training that made them.
        tuned: the model.
        spec: of the run.
        questions: of all its tasks.
        final: the scores at the end: they are those of the checkpoint with the same weights.
        base: `weights_fingerprint` of the base before the adapter came.
        run: its directory; what was answered there is not asked again.
        world: the processes.
        screen: where progress is shown.
        stop: polled between batches.

    Returns:
        step, epoch, eval_loss, best (whether it has the lowest validation loss) and scores by task, of each.

    Raises:
        Interrupted: somebody asked to stop.
        DiskError: a checkpoint is damaged.
    """
    folders = {step: f"{PREDICTIONS}/step-{step:08d}" for step in fitted.curve if step != fitted.final_step}
    if world.is_main:
        run.make_folders(PREDICTIONS, folders.values())
    world.barrier()
    scores: dict[int, Mapping[str, Any]] = {fitted.final_step: final}
    for step, folder in folders.items():
        load_parameters(tuned, run.path, step)
        identity = identity_of(tuned, base)
        screen.note(f"The training curve at step {step}:")
        found = scores[step] = {}
        for asked in questions:
            if world.is_main:
                run.set_status("running", stage=f"scoring {asked.name} at step {step}")
            found[asked.name] = score(
                asked,
                tuned,
                spec,
                world=world,
                screen=screen,
                stop=stop,
                directory=run.path,
                identity=identity,
                folder=folder,
            )
    return [_point(step, fitted.progress, fitted.plan.steps_per_epoch, scores[step]) for step in fitted.curve]


def _point(step: int, progress: Progress, steps_per_epoch: int, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / steps_per_epoch,
        "eval_loss": dict(progress.evaluations)[step],
        "best": step == progress.best_step,
        "scores": dict(scores),
    }
