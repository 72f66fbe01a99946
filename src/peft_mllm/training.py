"""The one training loop. It knows no method, family or task by name: it gets what varies as arguments.

The step is `train_step`. Around it: data in a planned order, evaluation on the validation split, the best
checkpoint, early stopping, metrics, and an end that can always be taken up again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_mllm.data.plan import Plan
from peft_mllm.data.trees import Batch
from peft_mllm.errors import RESUME, DiskError, DivergedError, Interrupted
from peft_mllm.gradients import at_once, in_order
from peft_mllm.memory.relief import Relief
from peft_mllm.optimizer import flat_state, load_flat_state
from peft_mllm.pieces import clip_to_norm, cut_like, whole
from peft_mllm.progress import Progress, StepResult
from peft_mllm.rundir import START_AGAIN, Checkpoint, RunDir, checkpoint_name, verify
from peft_mllm.seeds import derive
from peft_mllm.spec import TrainSpec
from peft_mllm.tuned import Tuned
from peft_mllm.world import World

STATE = "state.safetensors"
MakeBatches = Callable[[Sequence[int]], list[Batch]]
"""Indices of a micro-batch's samples to what is computed at once: one batch, or several where one is too large."""
Compute = Callable[[Batch, int, float], Tensor]
"""A batch, the seed of its dropout and the step's answer tokens to its losses (A,); their gradients, divided by those
tokens, are added to the parameters'."""


@dataclass(frozen=True)
class Job:
    """Everything a training needs.

    Attributes:
        tuned: the model.
        optimizer: over its trainable parameters.
        schedule: step -> factor on the peak learning rates.
        plan: the order of the samples.
        total_steps: where training ends.
        make_batches: training samples to what is computed at once.
        validation: makes the validation batches of this process, anew at each evaluation; None without a split.
        spec: the options of training.
        seed: of the run.
        run: the run directory.
        world: the processes.
        log: called with each line of metrics.jsonl; for trackers.
        show: called after each step with its number, loss and tokens per second; for the progress bar.
        stop: whether somebody asked to stop; polled after each step.
        relief: computes a step's gradients, in smaller parts where memory runs out.
        compute: a batch's losses; adds their gradients.
        clock: seconds that the run has taken, since any moment.
        ordered: add gradients in the order of the micro-batches, so that the number of processes changes no bit.
        wanted: the evaluated steps so far whose checkpoints will be used after training, beside the best.
    """

    tuned: Tuned
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    plan: Plan
    total_steps: int
    make_batches: MakeBatches
    validation: Callable[[], Iterator[Batch]] | None
    spec: TrainSpec
    seed: int
    run: RunDir
    world: World
    log: Callable[[dict[str, Any]], None]
    show: Callable[[int, float, float], None]
    stop: Callable[[], bool]
    relief: Relief
    compute: Compute
    clock: Callable[[], float]
    ordered: bool = False
    wanted: Callable[[Progress], Collection[int]] = lambda progress: ()
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", self.tuned.trainable())


def train_step(job: Job, step: int, batches: Sequence[Batch]) -> StepResult:
    """One update from this process's micro-batches: the mean over all answer tokens of the step."""
    params, world = list(job.parameters.values()), job.world
    tokens, answers, sequence_tokens, images = map(int, world.sum(*_counted(batches)))
    for group in job.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * job.schedule(step)

    def gradients(of: Sequence[Batch]) -> list[Tensor]:
        # dropout is a function of step and samples: resuming changes nothing, nor does the number of processes
        seeds = [derive(job.seed, "dropout", step, batch.sample_ids[0]) for batch in of]
        _keep_in_step(job, step, len(of))
        return [job.compute(batch, seed, answers) for batch, seed in zip(of, seeds, strict=True)]

    add_up = in_order if job.ordered else at_once
    batches, losses = add_up(gradients, batches, job.plan.step(step), params, world, job.relief)
    loss = world.exact_sum([each.detach().double().sum().item() for each in losses]) / answers
    norm = clip_to_norm(params, job.spec.max_grad_norm or float("inf")).item()
    if not torch.tensor([loss, norm]).isfinite().all():
        raise DivergedError(_why_diverged(world, step, loss, norm, batches, losses))
    job.optimizer.step()
    job.optimizer.zero_grad()
    return StepResult(loss, norm, tokens, answers, sequence_tokens, images)


def _keep_in_step(job: Job, step: int, count: int) -> None:
    """Where weights lie in pieces, compute as often as the process that does most; what that adds to gradients is 0."""
    shards = job.tuned.shards
    for _ in range(shards.most(count) - count if shards else 0):
        job.compute(job.make_batches(job.plan.step(step)[0])[0], 0, math.inf)


def _counted(batches: Sequence[Batch]) -> list[int]:
    """Tokens, those that are learned, and tokens and images as they were without sharing."""
    return [
        sum(batch.tokens for batch in batches),
        sum(batch.answer_tokens for batch in batches),
        sum(batch.sequence_tokens for batch in batches),
        sum(batch.images for batch in batches),
    ]


def train(job: Job) -> Progress:
    """Train to the end, from the newest good checkpoint where there is one.

    Raises:
        DivergedError: a loss or gradient was not finite; nothing of that step was applied or saved.
        Interrupted: somebody asked to stop; the state is saved.
    """
    progress = _resume(job)
    began = job.clock() - progress.seconds
    for batches in _steps(job, progress.step):
        if progress.stopped_early:
            break
        if not job.tuned.model.training:  # going through all modules takes as long as a small layer
            job.tuned.model.train()
        result = train_step(job, progress.step, batches)
        progress.advance(result, job.clock() - began)
        job.show(progress.step, result.loss, progress.tokens_per_second)
        gained = _due(job, job.spec.eval_strategy, job.spec.eval_steps, progress.step) and _evaluate(job, progress)
        last = progress.step == job.total_steps or progress.stopped_early
        if last or progress.step % job.spec.logging_steps == 0:
            _log_window(job, progress, result)
        interrupted = job.world.any(job.stop())
        due = _due(job, job.spec.save_strategy, job.spec.save_steps, progress.step)
        if gained or interrupted or due or last or progress.step in job.wanted(progress):
            save_checkpoint(job, progress)
        if interrupted:
            raise Interrupted(f"Stopped at step {progress.step} of {job.total_steps}, saved: {RESUME}")
    job.tuned.model.eval()
    return progress


def _steps(job: Job, start: int) -> Iterator[list[Batch]]:
    """This process's micro-batches of each step from `start` on."""

    def batches(step: int) -> list[Batch]:
        return [batch for samples in _samples(job, step) for batch in job.make_batches(samples)]

    workers = job.spec.dataloader_num_workers
    loader: DataLoader[list[Batch]] = DataLoader(
        _Mapped(batches), sampler=range(start, job.total_steps), batch_size=None, num_workers=workers
    )
    yield from loader


def _samples(job: Job, step: int) -> list[list[int]]:
    """The samples of each of this process's micro-batches of a step."""
    return job.plan.step(step)[job.world.rank :: job.world.size]


class _Mapped(torch.utils.data.Dataset[list[Batch]]):
    """A function of the step as a dataset, so that torch's loader can make steps ahead in other processes."""

    def __init__(self, function: Callable[[int], list[Batch]]):
        self._function = function

    def __getitem__(self, step: int) -> list[Batch]:
        return self._function(step)


def _due(job: Job, strategy: str, every: int, step: int) -> bool:
    period = {"no": None, "steps": every, "epoch": job.plan.steps_per_epoch}[strategy]
    return period is not None and (step % period == 0 or step == job.total_steps)


def _log_window(job: Job, progress: Progress, newest: StepResult) -> None:
    """Log the mean loss since the last line, and the newest step's rate and gradient."""
    line = {
        "step": progress.step,
        "epoch": progress.step / job.plan.steps_per_epoch,
        "loss": progress.window_loss / progress.window_answer_tokens,
        "learning_rate": job.optimizer.param_groups[0]["lr"],
        "grad_norm": newest.grad_norm,
        "tokens_per_second": progress.tokens_per_second,
        "seconds": progress.seconds,
    }
    progress.window_loss, progress.window_answer_tokens = 0.0, 0
    _write(job, line)


def _evaluate(job: Job, progress: Progress) -> bool:
    """Measure the validation loss; true when it is the lowest so far."""
    if job.validation is None:
        return False
    loss = mean_loss(job.tuned, job.validation(), job.world)
    _write(job, {"step": progress.step, "eval_loss": loss})
    progress.evaluations.append((progress.step, loss))
    gained = progress.best_eval_loss is None or loss < progress.best_eval_loss
    if gained:
        progress.best_step, progress.best_eval_loss = progress.step, loss
        progress.evaluations_without_gain = 0
    else:
        progress.evaluations_without_gain += 1
    patience = job.spec.early_stopping_patience
    progress.stopped_early = patience is not None and progress.evaluations_without_gain >= patience
    return gained


@torch.no_grad()
def mean_loss(tuned: Tuned, batches: Iterator[Batch], world: World) -> float:
    """Mean cross-entropy over all answer tokens of all processes' batches.

    Raises:
        DivergedError: it is not finite; names the samples.
    """
    tuned.model.eval()
    sums, answers = [], 0
    bad: list[str] = []
    with tuned.in_step():
        for batch in batches:
            losses = tuned.answer_losses(batch.to(tuned.device))
            sums.append(losses.double().sum().item())
            answers += batch.answer_tokens
            bad += _bad_samples(batch, losses)
    loss = world.exact_sum(sums) / world.sum(answers)[0]
    if not math.isfinite(loss):
        raise DivergedError(
            f"The validation loss is {loss}. Samples: {_listed(world.gather(bad))}. The last checkpoint is good. "
            "Look at these samples, or lower train.learning_rate."
        )
    return loss


def _write(job: Job, line: dict[str, Any]) -> None:
    job.log(line)
    if job.world.is_main:
        job.run.log(line)


def save_checkpoint(job: Job, progress: Progress) -> None:
    """Commit trainable parameters, optimizer state and progress: one file whatever the number of processes.

    Raises:
        DivergedError: a value is not finite; nothing is saved.
    """
    tensors = {f"parameter|{name}": p.detach() for name, p in job.parameters.items()}
    tensors |= {f"optimizer|{k}": v for k, v in flat_state(job.optimizer, job.parameters).items()}
    bad: list[str] = []
    on_cpu: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        bad += [] if together.isfinite().all() else [name]
        on_cpu |= {name: together.contiguous().cpu()} if job.world.is_main else {}
    if bad:
        raise DivergedError(
            f"Training diverged at step {progress.step}: {bad[0]} is not finite after the update. Nothing of this "
            "step was saved; the last checkpoint is good. Lower train.learning_rate."
        )
    if job.world.is_main:
        job.run.commit(
            checkpoint_name(progress.step),
            lambda directory: save_file(on_cpu, directory / STATE),
            facts=asdict(progress),
        )
        job.run.set_status("running", step=progress.step)
        best = set() if progress.best_step is None else {progress.best_step}
        kept = map(checkpoint_name, best.union(job.wanted(progress)))
        job.run.rotate(keep=job.spec.save_total_limit, protect=[*kept])
    job.world.barrier()


def _resume(job: Job) -> Progress:
    """Go back to the newest checkpoint that verifies; without one, to the beginning."""

    def doubt(checkpoint: Checkpoint) -> list[str]:
        """Without the checkpoints that it counts on, a run cannot end: take an older one and make them again."""
        progress = Progress(**checkpoint.facts)
        needed = dict.fromkeys(job.wanted(progress), "a checkpoint that it counts on,")
        if job.spec.load_best_model_at_end and progress.best_step is not None:
            needed[progress.best_step] = "its best checkpoint"
        needed.pop(checkpoint.step, None)
        names = {checkpoint_name(step): what for step, what in needed.items()}
        return [
            f"{what} {name} cannot be used: {why}"
            for name, what in names.items()
            for why in verify(job.run.path / name)
        ]

    checkpoint = job.run.latest_checkpoint(doubt=doubt) if job.world.is_main else None
    path, facts = job.world.share((checkpoint.path, checkpoint.facts) if checkpoint else (None, {}))
    progress = Progress(**facts)
    if path is not None:
        load_checkpoint(job, path)
        progress.resumed += 1
    if job.world.is_main:
        job.run.drop_after(progress.step)
        job.run.rewind_log(progress.step)
        job.run.set_status("running", stage="training", step=progress.step, total=job.total_steps)
    return progress


def load_checkpoint(job: Job, directory: Path) -> None:
    """Put back the parameters and the optimizer state of a verified checkpoint."""
    tensors = load_file(directory / STATE)
    _put_back(job.parameters, tensors)
    state = {k.removeprefix("optimizer|"): v for k, v in tensors.items() if k.startswith("optimizer|")}
    load_flat_state(job.optimizer, job.parameters, state)


@torch.no_grad()
def _put_back(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(cut_like(tensors[f"parameter|{name}"], parameter))


def load_parameters(tuned: Tuned, run: Path, step: int) -> None:
    """Give a model the trained parameters of a step's checkpoint.

    Raises:
        DiskError: that checkpoint is damaged.
    """
    path = run / checkpoint_name(step)
    if doubts := verify(path):
        raise DiskError(f"The checkpoint {path} cannot be used: {'; '.join(doubts)}. {START_AGAIN}")
    _put_back(tuned.trainable(), load_file(path / STATE))


def load_best(job: Job, progress: Progress) -> bool:
    """Go back to the weights of the lowest validation loss; false where the last weights are those.

    Raises:
        DiskError: that checkpoint is damaged.
    """
    best = progress.best_step
    if not job.spec.load_best_model_at_end or best is None or best == progress.step:
        return False
    load_parameters(job.tuned, job.run.path, best)
    return True


def _bad_samples(batch: Batch, losses: torch.Tensor) -> list[str]:
    """The samples with a loss that is not finite."""
    owners = batch.owners.cpu()[~losses.detach().isfinite().cpu()]
    return [batch.sample_ids[owner] for owner in sorted(set(owners.tolist()))]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _why_diverged(
    world: World, step: int, loss: float, norm: float, batches: Sequence[Batch], losses: Sequence[torch.Tensor]
) -> str:
    # loss and norm are sums over the processes, so all of them are here, and each knows only its own samples
    pairs = zip(batches, losses, strict=True)
    bad = world.gather([name for batch, each in pairs for name in _bad_samples(batch, each)])
    everyone = world.gather([name for batch in batches for name in batch.sample_ids])
    what = f"the loss is {loss}" if bad else f"the gradient's norm is {norm}"
    who = _listed(bad or everyone)
    return (
        f"Training diverged at step {step + 1}: {what}. Samples: {who}. Nothing of this step was applied; the last "
        f"checkpoint is good. Look at these samples, or lower train.learning_rate."
    )
