"""THE JUNCTION: one spec -> family, method, task -> train -> evaluate -> result.json.

The only file that knows all shelves. Running the same spec again resumes, or returns the finished result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peft_mllm.anatomy import PARTS, Part
from peft_mllm.assets import EMBEDDED
from peft_mllm.common import Common
from peft_mllm.curve import score_curve
from peft_mllm.data.encode import Sample
from peft_mllm.data.supply import measure_with
from peft_mllm.errors import MethodError, SpecError
from peft_mllm.features import Sight, Store, watch
from peft_mllm.fitting import Fitted, Fitting
from peft_mllm.identity import identity_of
from peft_mllm.interrupt import stop_requests
from peft_mllm.loading import architecture, dtype_for
from peft_mllm.matrix.known import Combination, consult
from peft_mllm.methods import METHODS
from peft_mllm.methods.base import Method
from peft_mllm.models import Family
from peft_mllm.optimizer import check_names, learning_rates
from peft_mllm.parts import sizes_of
from peft_mllm.provenance import environment, peak_memory, weights_fingerprint
from peft_mllm.quantization import size_of
from peft_mllm.record import Record
from peft_mllm.retention import Subject, answers_of, in_words, measure, measure_base, plain_text, retained
from peft_mllm.rundir import ADAPTER, RunDir, checkpoint_name
from peft_mllm.scored import score
from peft_mllm.screen import Screen
from peft_mllm.seeds import derive
from peft_mllm.sharding import asked_for, shards_of, whole_for
from peft_mllm.spec import NamedSpec, Spec
from peft_mllm.specfile import build
from peft_mllm.splits import Opened, Splits
from peft_mllm.tasks import TASKS, Task
from peft_mllm.tuned import Tuned, attach, trained_parts, untouched
from peft_mllm.world import World

Result = dict[str, Any]

NOTES = {
    "tiny": "The base has random weights: these scores mean nothing.",
    "embedded": "The base is a demonstration of some million parameters that knows only generated scenes: these "
    "scores say nothing about models of practical size, and mean nothing on other data.",
}


def run(
    spec: Spec,
    *,
    quiet: bool = False,
    before: Callable[[Runner], None] = lambda runner: None,
    common: Common | None = None,
) -> Result:
    """Train and evaluate one spec in its run directory, from wherever an earlier call stopped.

    Args:
        spec: what to run.
        quiet: show nothing.
        before: called when model and data are there and nothing is trained; what it raises ends the run.
        common: what it shares with other runs of this process; None with nobody.

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
                finish(writer, spec, done)
            screen.note(f"{directory} is finished, and this is its result. Delete it to run again.")
            return done
        if writer:
            writer.set_status("running", stage="loading")
        common = common or Common()
        stop = common.stop or stack.enter_context(stop_requests())
        runner = Runner(spec, writer or RunDir(directory), world, screen, stop, common)
        before(runner)
        result = runner.result()
        if writer:
            writer.write_result(result)
            finish(writer, spec, result)
        return result


def finish(writer: RunDir, spec: Spec, result: Result) -> None:
    """Let go of the checkpoints that only the training curve needed, and say that the run is done."""
    if spec.curve.wanted:
        best = (result["training"].get("best") or {}).get("step")
        writer.rotate(keep=spec.train.save_total_limit, protect=[] if best is None else [checkpoint_name(best)])
    writer.set_status("done", exit_code=0, stage="")


class Runner:
    """One run from its spec to its result; each method is one stage."""

    def __init__(
        self, spec: Spec, run_dir: RunDir, world: World, screen: Screen, stop: Callable[[], bool], common: Common
    ) -> None:
        self.spec, self.run_dir, self.world, self.screen, self.stop = spec, run_dir, world, screen, stop
        self.common = common
        check_names(spec.train)
        self.method: Method[Any] = build(METHODS, spec.method)
        self.shard = asked_for(spec.speed, world, quantization=spec.model.quantization)
        self.doubts = self._consult()
        tasks = {each.name: self._task(each) for each in (spec.task, *spec.evaluate)}
        dtype = dtype_for(spec.model.dtype, world.device)
        self.bf16 = spec.train.bf16 or dtype == "bfloat16"
        self.family: Family = common.load(spec.model, dtype)
        self.family.encode = common.encodings.before(self.family.encode)  # type: ignore[method-assign]
        if spec.connector == "released":
            self.family.anatomy = self.family.anatomy.released()
        self.family.anatomy.check(self.family.model)
        self.parameters = sum(map(size_of, self.family.model.parameters()))
        self.fingerprint = weights_fingerprint(self.family.model)
        self.sizes = sizes_of(self.family.model, self.family.anatomy)
        # all data is checked before the model goes to a device: what is wrong is said while it is cheap
        length = measure_with(self._encode, spec.data.max_length)
        splits = Splits(tasks=tasks, data=spec.data, seed=spec.seed, measure=length, screen=screen, read=common.opened)
        self.train_split = splits.training() if self._wanted() else None
        self.validation_split = splits.validation() if self._wanted() else None
        if spec.curve.wanted and self._wanted() and self.validation_split is None:
            raise SpecError(
                f"curve needs a validation loss, and {spec.task.name} has no validation data. Hold out some of its "
                "training data with data.validation_fraction, or leave curve out."
            )
        self.questions = splits.questions(spec.scored)
        if self.shard == "none":  # else layer by layer, in pieces
            self.family.model.to(world.device)
        self.sight = self._sight()

    def _task(self, named: NamedSpec) -> Task:
        key, tasks = named.model_dump_json(), self.common.tasks
        if key not in tasks:
            tasks[key] = build(TASKS, named)
        return tasks[key]

    def _sight(self) -> Sight | None:
        """Vision once per image, where the tower stays as it is."""
        speed = self.spec.speed
        if self.spec.vision == "tuned":
            return None
        store = None
        if speed.vision_cache is not None and speed.vision_cache_gb:
            limit = round(speed.vision_cache_gb * 1e9)
            store = Store(speed.vision_cache, limit=limit, note=self.screen.note)
        connector = self.spec.connector == "tuned"
        return watch(
            self.family,
            connector=connector,
            bf16=self.bf16,
            store=store,
            held=self.common.held,
            note=self.screen.note,
        )

    def _consult(self) -> list[str]:
        """Refuse what the capability matrix knows to fail; notes on what it knew of other versions."""
        family, model_type = architecture(self.spec.model)
        combination = Combination(
            method=self.spec.method.name,
            options=self.method.options.model_dump(),
            family=family,
            model_type=model_type,
            connector=self.spec.connector != "frozen",
            checkpointing=self.spec.speed.recompute not in ("auto", "none", "offload"),
        )
        doubts = consult(combination)
        for doubt in doubts:
            self.screen.note(doubt)
        return doubts

    def _encode(self, record: Record) -> Sample:
        return self.family.encode(record, labels=self.spec.data.labels)

    def result(self) -> Result:
        """Attach, train, save, evaluate, and say it all."""
        subjects = self._subjects()
        before = {} if self.shard != "none" else self._of_base(subjects)
        tuned = self._attach()
        if self.shard != "none":
            tuned = self._in_pieces(tuned)
            before = self._before(tuned, subjects)
        rates = learning_rates(self.spec.train, self.method.learning_rate)
        parts = trained_parts(tuned, rates, self._wanted())
        fitted = None
        trained: Result = {"data": {}, "training": {}, "self_check": None, "plan": None, "adapter": None}
        if parts:
            self.screen.parts([(part.part, part.parameters, part.total, part.learning_rate) for part in parts])
            fitted = self._fit(tuned, rates)
            trained = fitted.to_json() | {"adapter": self._save(tuned)}
        self._stage("measuring retention")
        after = measure(tuned, subjects, rows=self._rows, world=self.world) if parts else before
        retention = retained(before, after)
        for line in in_words(retention) if parts else ():
            self.screen.note(f"retention, {line}")
        identity = identity_of(tuned, self.fingerprint)
        scores = {asked.name: self._score(asked, tuned, identity) for asked in self.questions}
        curve = self._curve(fitted, tuned, scores) if fitted and fitted.curve else []
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
                **self.sizes,
                "patches": self.family.patches,
            },
            "trainable": {p.part: {"parameters": p.parameters, "learning_rate": p.learning_rate} for p in parts},
            **trained,
            "scores": scores,
            "curve": curve,
            "retention": retention,
            "vision_cache": self.sight.to_json() if self.sight and self.sight.store else None,
            "peak_memory_bytes": peak_memory(self.world.device),
            "environment": environment(self.world.device),
            "processes": self.world.size,
            "together": self.common.runs,
            "shard": self.shard,
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

    def _in_pieces(self, tuned: Tuned) -> Tuned:
        """Cut the model; nothing has been computed with it so far, so that it never had to fit on a device."""
        own = tuned.model is tuned.base
        if own and self.spec.speed.deterministic != "off":
            raise SpecError(
                "speed.deterministic: world-size adds whole gradients in one order, and speed.shard has cut what "
                "trains here, whose gradients are added as they come. Leave one of them out, or train an adapter."
            )
        shards = shards_of(tuned.base, self.family.anatomy, self.world, self.shard, own=own)
        tuned.model.to(self.world.device)
        if self.sight:
            self.sight.prove()
        return replace(tuned, shards=shards)

    def _before(self, tuned: Tuned, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        """Likewise of a base in pieces, with its adapter switched off; where that is not possible, as it starts."""
        try:
            with tuned.untuned() as base:
                return measure_base(base, subjects, fingerprint=self.fingerprint, rows=self._rows, world=self.world)
        except MethodError:
            return measure(tuned, subjects, rows=self._rows, world=self.world)

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
        )

    def _wanted(self) -> set[Part]:
        """The parts that the spec asks to train; `none` asks nothing of the language model."""
        switches = {"connector": self.spec.connector, "vision": self.spec.vision}
        opened: set[Part] = {part for part in PARTS if switches.get(part, "frozen") != "frozen"}
        return opened | ({"llm"} if self.method.tunes_llm else set())

    def _fit(self, tuned: Tuned, rates: dict[Part, float]) -> Fitted:
        assert self.train_split is not None, "a run that trains has opened its data"
        if self.sight and self.spec.train.dataloader_num_workers:
            for split in (self.train_split, self.validation_split):
                self.sight.look_at(split.records if split else ())
        stage = Fitting(
            spec=self.spec,
            train=self.train_split,
            validation=self.validation_split,
            encode=self._encode,
            run=self.run_dir,
            world=self.world,
            screen=self.screen,
            stop=self.stop,
            common=self.common,
        )
        return stage.fit(tuned, rates)

    def _save(self, tuned: Tuned) -> Result | None:
        """The final adapter, committed like a checkpoint."""
        with whole_for(tuned.base, here=self.world.is_main) if tuned.model is tuned.base else nullcontext():
            if self.world.is_main:
                self.run_dir.commit(ADAPTER, tuned.save)
            self.world.barrier()
        files = [file for file in (self.run_dir.path / ADAPTER).rglob("*") if file.is_file()]
        return {"directory": ADAPTER, "bytes": sum(file.stat().st_size for file in files)}

    def _score(self, asked: Opened, tuned: Tuned, identity: str) -> Result:
        self._stage(f"scoring {asked.name}")
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

    def _curve(self, fitted: Fitted, tuned: Tuned, final: Result) -> list[Result]:
        return score_curve(
            fitted,
            tuned,
            self.spec,
            self.questions,
            final,
            base=self.fingerprint,
            run=self.run_dir,
            world=self.world,
            screen=self.screen,
            stop=self.stop,
        )

    def _stage(self, stage: str) -> None:
        if self.world.is_main:
            self.run_dir.set_status("running", stage=stage)

    def _method_json(self) -> Result:
        options = self.method.options.model_dump(mode="json")
        return {"name": self.spec.method.name, "location": options.pop("location", None), "options": options}


def notes_on(model: str) -> list[str]:
    """What a reader of the scores must know about the base."""
    known = "embedded" if model == str(EMBEDDED) else model.split(":")[0]
    return [NOTES[known]] if known in NOTES else []
