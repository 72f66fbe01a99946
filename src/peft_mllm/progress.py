"""How far a training is: what each step adds, and what a checkpoint carries so that a resumed run ends alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_mllm.spec import CurveSpec


@dataclass
class Progress:
    """How far a run is; saved with each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    answer_tokens: int = 0
    sequence_tokens: int = 0
    """What would have been computed without sharing."""
    images: int = 0
    """Passes through the vision tower, likewise."""
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """Step and validation loss of each."""
    best_step: int | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    resumed: int = 0
    window_loss: float = 0.0
    window_answer_tokens: int = 0
    """Since the last line of the log; saved, so that a resumed run writes the lines of an undisturbed one."""

    @property
    def tokens_per_second(self) -> float:
        """Since the beginning, evaluations included."""
        return self.tokens / max(self.seconds, 1e-9)

    def advance(self, result: StepResult, seconds: float) -> None:
        """Count a step."""
        self.window_loss += result.loss * result.answer_tokens
        self.window_answer_tokens += result.answer_tokens
        self.step += 1
        self.seconds = seconds
        self.tokens += result.tokens
        self.answer_tokens += result.answer_tokens
        self.sequence_tokens += result.sequence_tokens
        self.images += result.images


@dataclass(frozen=True)
class StepResult:
    """What a step did: its mean loss over answer tokens, and its gradient's norm before clipping."""

    loss: float
    grad_norm: float
    tokens: int
    answer_tokens: int
    sequence_tokens: int
    images: int


def curve_steps(progress: Progress, asked: CurveSpec, steps_per_epoch: int) -> list[int]:
    """The evaluated steps that the curve has, of those so far.

    Whichever it will have at the end and that is evaluated now is among them, so no other checkpoint need stay.
    """
    evaluated = [step for step, _ in progress.evaluations]
    chosen: set[int] = set()
    if asked.after_best and progress.best_step is not None:
        place = evaluated.index(progress.best_step)
        chosen.update(evaluated[place : place + 1 + asked.after_best])
    for epoch in asked.epochs if evaluated else ():
        chosen.add(min(evaluated, key=lambda step: (abs(step - epoch * steps_per_epoch), step)))
    return sorted(chosen)
