"""Training as a stage of a run: records to batches, the proof that sharing is exact, the loop, and its account."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft_mllm.anatomy import Part
from peft_mllm.common import Common
from peft_mllm.data.encode import Sample
from peft_mllm.data.plan import Plan
from peft_mllm.data.supply import Layout, Supply, account_of
from peft_mllm.data.trees import Batch
from peft_mllm.errors import MethodError
from peft_mllm.evaluation import pad_token
from peft_mllm.exactness import SelfCheck, layouts, lean_where_exact, proven, telling
from peft_mllm.lean import Levers, remove
from peft_mllm.matrix.known import KEEPS
from peft_mllm.memory.kept import plan_again, to_keep
from peft_mllm.memory.plan import MemoryPlan
from peft_mllm.memory.prepare import available_to, plan_run
from peft_mllm.memory.relief import Relief
from peft_mllm.optimizer import make_optimizer, make_schedule
from peft_mllm.progress import Progress, curve_steps
from peft_mllm.provenance import data_fingerprint
from peft_mllm.recompute import set_recompute
from peft_mllm.record import Record
from peft_mllm.rundir import RunDir
from peft_mllm.screen import Screen
from peft_mllm.spec import Spec, SpeedSpec
from peft_mllm.splits import Opened
from peft_mllm.trackers import Trackers
from peft_mllm.training import Job, load_best, train
from peft_mllm.tuned import Tuned
from peft_mllm.world import World

QUESTIONS_PER_IMAGE = 1.5
"""From so many on, on average, `group_by_image: auto` keeps the samples of an image together."""
SELF_CHECK_SAMPLES = 8
"""Compared at the start of training, or as many as a micro-batch has, so that this takes no more memory than a step."""


@dataclass(frozen=True)
class Fitted:
    """A training that ended.

    Attributes:
        progress: how far it came, and what it took.
        plan: its order.
        restored: whether the model has the weights of its lowest validation loss, which are not the last.
        layout: how samples lay in batches.
        memory: how steps were computed so that they fit.
        check: that it is exact; None where there is nothing to prove.
        lean: likewise that its lean layers are.
        data: the account of what was read.
        curve: the steps whose checkpoints are to be scored.
    """

    progress: Progress
    plan: Plan
    restored: bool
    layout: Layout
    memory: MemoryPlan
    check: SelfCheck | None
    lean: SelfCheck | None
    data: dict[str, Any]
    curve: tuple[int, ...]

    @property
    def final_step(self) -> int:
        """The step whose weights the model has."""
        best = self.progress.best_step
        return best if self.restored and best is not None else self.progress.step

    def to_json(self) -> dict[str, Any]:
        """What training took, for result.json."""
        return {
            "data": {"train": self.data},
            "training": {
                **training_json(self.progress, self.plan, restored=self.restored),
                "layout": self.layout,
                "group_by_image": self.plan.groups is not None,
            },
            "plan": self.memory.to_json(),
            "self_check": _in_json(self.check),
            "lean_check": _in_json(self.lean),
        }


def _in_json(check: SelfCheck | None) -> dict[str, Any] | None:
    return asdict(check) | {"passed": check.passed} if check else None


def training_json(progress: Progress, plan: Plan, *, restored: bool) -> dict[str, Any]:
    """Steps, time and tokens; `sequence_tokens` and `images` as they would be if no sample shared its image."""
    best = None
    if progress.best_step is not None:
        best = {"step": progress.best_step, "eval_loss": progress.best_eval_loss, "restored": restored}
    return {
        "steps": progress.step,
        "epochs": progress.step / plan.steps_per_epoch,
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "sequence_tokens": progress.sequence_tokens,
        "images": progress.images,
        "tokens_per_second": progress.tokens_per_second,
        "best": best,
        "stopped_early": progress.stopped_early,
        "resumed": progress.resumed,
    }


@dataclass(frozen=True)
class Fitting:
    """What a training needs beside the model.

    Attributes:
        spec: of the run.
        train: what is learned.
        validation: what the validation loss is measured on.
        encode: a record as the model reads it.
        run: the run directory.
        world: the processes.
        screen: where progress is shown.
        stop: whether somebody asked to stop.
        common: what it shares with other runs.
    """

    spec: Spec
    train: Opened
    validation: Opened | None
    encode: Callable[[Record], Sample]
    run: RunDir
    world: World
    screen: Screen
    stop: Callable[[], bool]
    common: Common

    def fit(self, tuned: Tuned, rates: dict[Part, float]) -> Fitted:
        """Train from wherever an earlier call stopped; the model ends with its best weights, or its last.

        Raises:
            MethodError: the method would make the model lose something of its input.
        """
        self._refuse_losing(tuned)
        supply, check, lean = self._proven(tuned)
        spec, curve = self.spec.train, self.spec.curve
        plan = Plan(
            size=len(supply.records),
            micro_batch=spec.per_device_train_batch_size,
            micro_batches=spec.gradient_accumulation_steps * self.world.size,
            seed=self.spec.seed,
            groups=self._groups(supply.records),
        )
        memory = self._fit_into_memory(tuned, supply, plan)
        supply = replace(supply, tokens=memory.micro_batch_tokens)
        validation = replace(supply, records=self.validation.records) if self.validation else None
        total = spec.max_steps if spec.max_steps > 0 else math.ceil(spec.num_train_epochs * plan.steps_per_epoch)
        optimizer = make_optimizer(tuned.trainable(), tuned.family.anatomy, rates, spec)
        trackers = Trackers(spec.report_to, directory=self.run.path, main=self.world.is_main, title=self.spec.title)
        if any(self.run.path.glob("checkpoints/step-*")):
            self.screen.note("Going on from the last good checkpoint.")
        with trackers, self.screen.bar(f"training {self.spec.title}", total) as bar:

            def show(step: int, loss: float, tokens_per_second: float) -> None:
                bar.advance(to=step, facts={"loss": f"{loss:.3f}", "tokens/s": f"{tokens_per_second:,.0f}"})

            job = Job(
                tuned=tuned,
                optimizer=optimizer,
                schedule=make_schedule(optimizer, spec, total),
                plan=plan,
                total_steps=total,
                make_batches=supply.batches,
                validation=self._batches(validation),
                spec=spec,
                seed=self.spec.seed,
                run=self.run,
                world=self.world,
                log=trackers.log,
                show=show,
                stop=self.stop,
                relief=self._relief(tuned, supply, memory),
                compute=self.common.compute(tuned, memory.micro_batch_tokens),
                clock=self.common.clock,
                ordered=self.spec.speed.deterministic == "world-size",
                wanted=lambda progress: curve_steps(progress, curve, plan.steps_per_epoch),
            )
            progress = train(job)
            restored = load_best(job, progress)
        steps = tuple(curve_steps(progress, curve, plan.steps_per_epoch))
        set_recompute(tuned.base, tuned.family.anatomy, "none")
        remove(tuned.base, tuned.family.anatomy)
        return Fitted(progress, plan, restored, supply.layout, memory, check, lean, self._account(), steps)

    def _account(self) -> dict[str, Any]:
        """What was read, and what became of it."""
        train, held_out = self.train, self.validation.records if self.validation else ()
        account = account_of(train.name, train.records, train.report, data_fingerprint(train.records))
        origin = train.task.origin("train")
        account |= {"origin": dict(origin)} if origin else {}
        return account | {"validation": len(held_out)}

    def _refuse_losing(self, tuned: Tuned) -> None:
        """Refuse a method that acts in front of a model which is told more of its tokens than their ids.

        The matrix knows the architectures that it has tried; this holds for all.
        """
        records = self.train.records
        sample = self.encode(next((record for record in records if record.images), records[0]))
        told = ["positions on several axes"] if sample.positions is not None else []
        told += sorted(sample.extras)
        if told and not tuned.takes_padding:
            raise MethodError(
                f"{self.spec.title} puts virtual tokens in front of the model, and this model would lose "
                f"{', '.join(told)} of its image tokens by that, silently. {KEEPS}"
            )

    def _proven(self, tuned: Tuned) -> tuple[Supply, SelfCheck | None, SelfCheck | None]:
        """The training data in the quickest layout that is exact on this model, and the proof; likewise lean layers."""
        supply = Supply(
            records=self.train.records,
            encode=self.encode,
            pixels=tuned.family.pixels,
            pad_id=pad_token(tuned),
            layout="padded",
            share=self.spec.data.share_prefix,
        )
        count = max(2, min(SELF_CHECK_SAMPLES, self.spec.train.per_device_train_batch_size))
        samples = [self.encode(record) for record in telling(self.train.records, count)]
        supply, check = proven(tuned, supply, samples, layouts(tuned, self.spec), note=self.screen.note)
        if self.spec.speed.lean == "off":
            return supply, check, None
        levers = Levers(compiled=self.spec.speed.compile)
        return supply, check, lean_where_exact(tuned, samples, supply, levers, note=self.screen.note)

    def _fit_into_memory(self, tuned: Tuned, supply: Supply, order: Plan) -> MemoryPlan:
        """Decide how a step is computed, say so, and let the model compute so; the same in all processes."""
        plan = None
        if self.world.is_main:
            there = available_to(tuned, tuned.device, processes=self.world.size)

            def planned(speed: SpeedSpec) -> MemoryPlan:
                spec = self.spec.model_copy(update={"speed": speed})
                return plan_run(tuned, supply, order, spec, device=tuned.device, dtype=None, available=there)

            speed = self.spec.speed
            with tuned.shards.apart() if tuned.shards else nullcontext():
                plan = plan_again(self.run.kept_plan(), speed, planned, note=self.screen.note)
            self.run.keep_plan(to_keep(plan, speed))
            for line in plan.in_words():
                self.screen.note(line)
        plan = self.world.share(plan)
        assert plan is not None, "the main process has made one"
        set_recompute(tuned.base, tuned.family.anatomy, plan.policy)
        return plan

    def _relief(self, tuned: Tuned, supply: Supply, memory: MemoryPlan) -> Relief:
        """What is done where a step does not fit all the same."""
        return Relief(
            relay=lambda indices, tokens: replace(supply, tokens=tokens).batches(indices),
            recompute=lambda policy: set_recompute(tuned.base, tuned.family.anatomy, policy),
            note=self.screen.note,
            policy=memory.policy,
            again=tuned.shards is None,
            whole=self.spec.speed.deterministic == "world-size",
        )

    def _batches(self, supply: Supply | None) -> Callable[[], Iterator[Batch]] | None:
        if supply is None:
            return None
        size = self.spec.train.per_device_eval_batch_size
        return lambda: supply.all(size, rank=self.world.rank, world_size=self.world.size)

    def _groups(self, records: Sequence[Record]) -> tuple[tuple[str, ...], ...] | None:
        """What keeps samples of one image together; None where they are to be shuffled one by one."""
        wanted = self.spec.data.group_by_image
        if wanted is False:
            return None
        groups = tuple(tuple(image.key for image in record.images) or (record.id,) for record in records)
        pays = len(groups) >= QUESTIONS_PER_IMAGE * len(set(groups))
        return groups if wanted is True or pays else None
