"""THE JUNCTION: one spec -> family, method, task -> train -> evaluate -> result.json.

The only file that knows all shelves. Running the same spec again resumes, or returns the finished result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peft_mllm.anatomy import PARTS, Part
from peft_mllm.assets import EMBEDDED
from peft_mllm.data.encode import Sample
from peft_mllm.data.plan import Plan
from peft_mllm.data.supply import Supply, account_of, measure_with
from peft_mllm.errors import DataError, MethodError
from peft_mllm.evaluation import pad_token
from peft_mllm.exactness import SelfCheck, self_check, telling
from peft_mllm.identity import identity_of
from peft_mllm.interrupt import stop_requests
from peft_mllm.loading import architecture, dtype_for, load_family
from peft_mllm.matrix.known import KEEPS, Combination, consult
from peft_mllm.methods import METHODS, Method
from peft_mllm.models import Family
from peft_mllm.optimizer import check_names, learning_rates, make_optimizer, make_schedule
from peft_mllm.provenance import data_fingerprint, environment, peak_memory, weights_fingerprint
from peft_mllm.quantization import size_of
from peft_mllm.record import Record
from peft_mllm.retention import Subject, answers_of, in_words, measure, measure_base, plain_text, retained
from peft_mllm.rundir import ADAPTER, RunDir
from peft_mllm.scored import score
from peft_mllm.screen import Screen
from peft_mllm.seeds import derive
from peft_mllm.spec import Spec
from peft_mllm.specfile import build
from peft_mllm.splits import Opened, open_split, split_off
from peft_mllm.tasks import TASKS, Split, Task
from peft_mllm.trackers import Trackers
from peft_mllm.training import Job, Progress, load_best, train
from peft_mllm.tuned import Tuned, attach, trained_parts, untouched
from peft_mllm.world import World

Result = dict[str, Any]

SELF_CHECK_SAMPLES = 8
"""Compared at the start of training: enough for a tree or two, few enough to cost nothing."""
NOTES = {
    "tiny": "The base has random weights: these scores mean nothing.",
    "embedded": "The base is a demonstration of some million parameters that knows only generated scenes: these "
    "scores say nothing about models of practical size, and mean nothing on other data.",
}


def run(spec: Spec, *, quiet: bool = False) -> Result:
    """Train and evaluate one spec in its run directory, from wherever an earlier call stopped.

    Returns:
        the content of result.json.

    Raises:
        UserError: its subclass and message say what, where and how to mend it; its exit_code is the process's.
    """
    world = World()
    screen = Screen(quiet=quiet or not world.is_main)
    directory = Path(spec.output_dir)
    outcome = spec.outcome()
    # of all processes: 1 x 2 micro-batches are the same run as 2 x 1, and 2 x 2 are another
    outcome["train"]["gradient_accumulation_steps"] *= world.size
    with ExitStack() as stack:
        writer = stack.enter_context(RunDir.open(directory, outcome)) if world.is_main else None
        done: Result | None = world.share(writer.result() if writer else None)
        if done is not None:
            if writer and (writer.status() or {}).get("state") != "done":  # killed between result and status
                writer.set_status("done", exit_code=0)
            screen.note(f"{directory} is finished, and this is its result. Delete it to run again.")
            return done
        if writer:
            writer.set_status("running")
        stop = stack.enter_context(stop_requests())
        result = Runner(spec, writer or RunDir(directory), world, screen, stop).result()
        if writer:
            writer.write_result(result)
            writer.set_status("done", exit_code=0)
        return result


class Runner:
    """One run from its spec to its result; each method is one stage."""

    def __init__(self, spec: Spec, run_dir: RunDir, world: World, screen: Screen, stop: Callable[[], bool]) -> None:
        self.spec, self.run_dir, self.world, self.screen, self.stop = spec, run_dir, world, screen, stop
        check_names(spec.train)
        self.method: Method[Any] = build(METHODS, spec.method)
        self.doubts = self._consult()
        tasks = {spec.task.name: build(TASKS, spec.task)} | {each.name: build(TASKS, each) for each in spec.evaluate}
        dtype = dtype_for(spec.model.dtype, world.device)
        self.bf16 = spec.train.bf16 or dtype == "bfloat16"
        self.family: Family = load_family(spec.model, dtype=dtype)
        if spec.connector == "released":
            self.family.anatomy = self.family.anatomy.released()
        self.family.anatomy.check(self.family.model)
        self.parameters = sum(map(size_of, self.family.model.parameters()))
        self.fingerprint = weights_fingerprint(self.family.model)
        # all data is checked before the model goes to a device: what is wrong is said while it is cheap
        self.train_split = self._open(tasks, spec.task.name, "train") if self._wanted() else None
        self.validation_split = self._open(tasks, spec.task.name, "validation") if self._wanted() else None
        if self._wanted() and not (self.train_split and self.train_split.records):
            raise DataError(f"{spec.task.name}: there is nothing to train on. Give the task training data.")
        tests = [self._open(tasks, name, "test") for name in tasks]
        self.questions = [opened for opened in tests if opened is not None]
        for asked in self.questions:
            if not asked.records:
                raise DataError(f"{asked.name}: its test split is empty, there is nothing to score.")
        self.family.model.to(world.device)

    def _consult(self) -> list[str]:
        """Refuse what the capability matrix knows to fail; notes on what it knew of other versions."""
        family, model_type = architecture(self.spec.model)
        combination = Combination(
            method=self.spec.method.name,
            options=self.method.options.model_dump(),
            family=family,
            model_type=model_type,
            connector=self.spec.connector != "frozen",
            checkpointing=self.spec.train.gradient_checkpointing,
        )
        doubts = consult(combination)
        for doubt in doubts:
            self.screen.note(doubt)
        return doubts

    def _open(self, tasks: dict[str, Task], name: str, split: Split) -> Opened | None:
        if not tasks[name].has(split):
            return None
        data = self.spec.data
        measure = measure_with(self._encode, data.max_length)
        limit = data.max_train_samples if split == "train" else data.max_eval_samples
        return open_split(tasks[name], name, split, measure=measure, limit=limit, screen=self.screen)

    def _encode(self, record: Record) -> Sample:
        return self.family.encode(record, labels=self.spec.data.labels)

    def result(self) -> Result:
        """Attach, train, save, evaluate, and say it all."""
        subjects = self._subjects()
        before = self._of_base(subjects)
        tuned = self._attach()
        rates = learning_rates(self.spec.train, self.method.learning_rate)
        parts = trained_parts(tuned, rates, self._wanted())
        trained: Result = {"data": {}, "training": {}, "self_check": None, "adapter": None}
        if parts:
            self.screen.parts([(part.part, part.parameters, part.total, part.learning_rate) for part in parts])
            trained = self._train(tuned, rates) | {"adapter": self._save(tuned)}
        after = measure(tuned, subjects, rows=self._rows, world=self.world) if parts else before
        retention = retained(before, after)
        for line in in_words(retention) if parts else ():
            self.screen.note(f"retention, {line}")
        identity = identity_of(tuned, self.fingerprint)
        return {
            "schema": 1,
            "name": self.spec.title,
            "spec": self.spec.model_dump(mode="json"),
            "spec_id": self.spec.id,
            "method": self._method_json(),
            "model": {
                "source": self.spec.model.path,
                "family": type(self.family).__name__.lower(),
                "parameters": self.parameters,
                "fingerprint": self.fingerprint,
            },
            "trainable": {p.part: {"parameters": p.parameters, "learning_rate": p.learning_rate} for p in parts},
            **trained,
            "scores": {asked.name: self._score(asked, tuned, identity) for asked in self.questions},
            "retention": retention,
            "peak_memory_bytes": peak_memory(self.world.device),
            "environment": environment(self.world.device),
            "processes": self.world.size,
            "seed": self.spec.seed,
            "notes": [*notes_on(self.spec.model.path), *self.doubts],
        }

    def _subjects(self) -> list[Subject]:
        """What is measured before and after training."""
        spec, others = self.spec.retention, [each for each in self.questions if each.name != self.spec.task.name]
        text = plain_text(self.family) if spec.text else None
        answers = [answers_of(each.name, each.records, self.family, most=spec.samples) for each in others]
        return [subject for subject in (text, *answers) if subject and subject.samples]

    def _of_base(self, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        base = untouched(self.family, bf16=self.bf16)
        return measure_base(base, subjects, fingerprint=self.fingerprint, rows=self._rows, world=self.world)

    @property
    def _rows(self) -> int:
        return self.spec.train.per_device_eval_batch_size

    def _attach(self) -> Tuned:
        torch.manual_seed(derive(self.spec.seed, "init"))
        return attach(
            self.family,
            self.method,
            connector=self.spec.connector != "frozen",
            vision=self.spec.vision == "tuned",
            bf16=self.bf16,
            gradient_checkpointing=self.spec.train.gradient_checkpointing,
        )

    def _wanted(self) -> set[Part]:
        """The parts that the spec asks to train; `none` asks nothing of the language model."""
        switches = {"connector": self.spec.connector, "vision": self.spec.vision}
        opened: set[Part] = {part for part in PARTS if switches.get(part, "frozen") != "frozen"}
        return opened | ({"llm"} if self.method.tunes_llm else set())

    def _train(self, tuned: Tuned, rates: dict[Part, float]) -> Result:
        supply, validation, account = self._supplies(tuned)
        check = self._check_sharing(tuned, supply)
        if check is not None and not check.passed:
            supply, validation = supply.unshared(), validation.unshared() if validation else None
        spec = self.spec.train
        plan = Plan(
            size=len(supply.records),
            micro_batch=spec.per_device_train_batch_size,
            micro_batches=spec.gradient_accumulation_steps * self.world.size,
            seed=self.spec.seed,
            groups=self._groups(supply.records),
        )
        total = spec.max_steps if spec.max_steps > 0 else math.ceil(spec.num_train_epochs * plan.steps_per_epoch)
        optimizer = make_optimizer(tuned.trainable(), self.family.anatomy, rates, spec)
        trackers = Trackers(spec.report_to, directory=self.run_dir.path, main=self.world.is_main, title=self.spec.title)
        if any(self.run_dir.path.glob("checkpoints/step-*")):
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
                make_batch=supply.batch,
                validation=self._batches(validation),
                spec=spec,
                seed=self.spec.seed,
                run=self.run_dir,
                world=self.world,
                log=trackers.log,
                show=show,
                stop=self.stop,
            )
            progress = train(job)
            restored = load_best(job, progress)
        return {
            "data": {"train": account},
            "training": training_json(progress, plan, restored=restored),
            "self_check": asdict(check) | {"passed": check.passed} if check else None,
        }

    def _supplies(self, tuned: Tuned) -> tuple[Supply, Supply | None, Result]:
        """Training and validation data with the account of what was read."""
        train = self.train_split
        assert train is not None, "a run that trains has opened its data"
        records, held_out = train.records, self.validation_split.records if self.validation_split else ()
        if self.spec.data.validation_fraction:
            records, held_out = split_off(records, self.spec.data.validation_fraction, self.spec.seed)
        self._refuse_losing(tuned, records)
        account = account_of(train.name, records, train.report, data_fingerprint(records))
        origin = train.task.origin("train")
        account |= {"origin": dict(origin)} if origin else {}
        return (
            self._supply(tuned, records),
            self._supply(tuned, held_out) if held_out else None,
            account | {"validation": len(held_out)},
        )

    def _refuse_losing(self, tuned: Tuned, records: Sequence[Record]) -> None:
        """Refuse a method that acts in front of a model which is told more of its tokens than their ids.

        The matrix knows the architectures that it has tried; this holds for all.
        """
        sample = self._encode(next((record for record in records if record.images), records[0]))
        told = ["positions on several axes"] if sample.positions is not None else []
        told += sorted(sample.extras)
        if told and not tuned.takes_padding:
            raise MethodError(
                f"{self.spec.title} puts virtual tokens in front of the model, and this model would lose "
                f"{', '.join(told)} of its image tokens by that, silently. {KEEPS}"
            )

    def _supply(self, tuned: Tuned, records: Sequence[Record]) -> Supply:
        return Supply(
            records=records,
            encode=self._encode,
            pixels=self.family.pixels,
            pad_id=pad_token(tuned),
            trees=tuned.trees,
            share=self.spec.data.share_prefix,
        )

    def _batches(self, supply: Supply | None) -> Callable[[], Any] | None:
        if supply is None:
            return None
        size = self.spec.train.per_device_eval_batch_size
        return lambda: supply.batches(size, rank=self.world.rank, world_size=self.world.size)

    def _groups(self, records: Sequence[Record]) -> tuple[tuple[str, ...], ...] | None:
        if not self.spec.data.group_by_image:
            return None
        return tuple(tuple(image.key for image in record.images) or (record.id,) for record in records)

    def _check_sharing(self, tuned: Tuned, supply: Supply) -> SelfCheck | None:
        """Prove on this model and data that sharing is exact; None where nothing is to be shared."""
        if not (supply.trees and supply.share):
            return None
        samples = [supply.encode(record) for record in telling(supply.records, SELF_CHECK_SAMPLES)]
        check = self_check(tuned, samples, pad_id=supply.pad_id)
        if check is not None and not check.passed:
            self.screen.note(
                f"WARNING: on this model, samples that share an image's prefix do not give the gradients of samples "
                f"one by one: they differ by {check.gradient:.1e}, where {check.tolerance:.0e} is rounding. Nothing is "
                "shared in this run, which is right but slower. Please report this."
            )
        return check

    def _save(self, tuned: Tuned) -> Result | None:
        """The final adapter, committed like a checkpoint."""
        if self.world.is_main:
            self.run_dir.commit(ADAPTER, tuned.save)
        self.world.barrier()
        files = [file for file in (self.run_dir.path / ADAPTER).rglob("*") if file.is_file()]
        return {"directory": ADAPTER, "bytes": sum(file.stat().st_size for file in files)}

    def _score(self, asked: Opened, tuned: Tuned, identity: str) -> Result:
        return score(
            asked,
            tuned,
            self.spec,
            world=self.world,
            screen=self.screen,
            stop=self.stop,
            directory=self.run_dir.path,
            identity=identity,
        )

    def _method_json(self) -> Result:
        options = self.method.options.model_dump(mode="json")
        return {"name": self.spec.method.name, "location": options.pop("location", None), "options": options}


def training_json(progress: Progress, plan: Plan, *, restored: bool) -> Result:
    """What training took, for result.json."""
    best = None
    if progress.best_step is not None:
        best = {"step": progress.best_step, "eval_loss": progress.best_eval_loss, "restored": restored}
    return {
        "steps": progress.step,
        "epochs": progress.step / plan.steps_per_epoch,
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "tokens_per_second": progress.tokens_per_second,
        "best": best,
        "stopped_early": progress.stopped_early,
        "resumed": progress.resumed,
    }


def notes_on(model: str) -> list[str]:
    """What a reader of the scores must know about the base."""
    known = "embedded" if model == str(EMBEDDED) else model.split(":")[0]
    return [NOTES[known]] if known in NOTES else []
