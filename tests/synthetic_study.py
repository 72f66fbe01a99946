"""Whole studies as the runner writes them, with made-up figures whose truth is known; shared by the tests of studies.

Each question has a difficulty, each level of an axis an effect in logits, each run a shift by its seed: what the
analysis should find is what was put in. Files have the fields of real ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_mllm.files import json_digest
from peft_mllm.spec import Spec
from peft_mllm.study.index import Index, Planned, write_index
from peft_mllm.study.outcomes import FULL, NOT_VARIED, ZERO_SHOT

METHODS = ("adapter", "lora", "ia3", "prefix")
TASKS = ("scenes_next", "scenes_at", "scenes_count")
SEEN = ("scenes_colour", "scenes_exists")
LLM, CONNECTOR, VISION = 980_096, 36_992, 291_456
TRAINABLE = {"adapter": 24_600, "lora": 36_900, "ia3": 1_150, "prefix": 5_120, FULL: LLM}
SECONDS = {"adapter": 24.0, "lora": 21.3, "ia3": 18.2, "prefix": 19.8, FULL: 38.5}
"""On the two cores of a laptop; other methods get figures made from their names."""
STEPS_PER_EPOCH = 32


@dataclass(frozen=True)
class Plan:
    """What every run of a synthetic study shares; the arguments of `write_study`."""

    directory: Path
    effects: Mapping[str, float]
    forgets: Mapping[str, float]
    questions: int
    seen: tuple[str, ...]
    tasks: tuple[str, ...]
    seed_sd: float
    transfers: bool
    curve: int
    epochs: int


@dataclass(frozen=True)
class Run:
    """One run to write."""

    factors: Mapping[str, str]
    seed: int
    stage: str = "final"
    tried: str = ""
    chosen: bool = False
    spec: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.factors["method"]

    @property
    def is_zero_shot(self) -> bool:
        return self.method == ZERO_SHOT


def write_study(
    directory: Path,
    *,
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str] = TASKS,
    connectors: Sequence[str] = ("frozen", "tuned"),
    seeds: Sequence[int] = (1, 2, 3),
    questions: int = 120,
    effects: Mapping[str, float] | None = None,
    forgets: Mapping[str, float] | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
    sizes: Mapping[str, Sequence[str]] | None = None,
    seen: Sequence[str] = SEEN,
    seed_sd: float = 0.15,
    transfers: bool = False,
    curve: int = 0,
    epochs: int = 3,
    trials: int = 0,
    zero_shot: bool = True,
    full: bool = True,
    failed: int = 0,
    missing: int = 0,
    title: str = "Synthetic study",
) -> Path:
    """Write a study's directory: study.json, run directories, and attempts of runs that failed.

    Args:
        directory: is made.
        methods: labels of the axis method, without zero-shot and full fine-tuning.
        tasks: trained tasks, each its own runs.
        connectors: levels; of one level the axis does not vary and is left out.
        seeds: of every trained run; zero-shot has none.
        questions: per task.
        effects: logits by label of any axis, or of several joined by `+` (`lora+tuned`); zero-shot is -0.5 and any
            other label 0 where not given.
        forgets: logits lost on the seen tasks, by label.
        axes: further axes with labels, such as {"data_size": ["1k", "5k"]}; known to no method's own.
        sizes: labels of the axis size, by method; methods not named have none.
        seen: tasks that the base could do; scored by every run.
        seed_sd: standard deviation of a run's shift, in logits; 0.15 is some 3 points.
        transfers: whether every run is scored on the other tasks too.
        curve: points of the training curve after the best that were scored.
        epochs: of training, with one evaluation each.
        trials: of the search, per method, on the first task and seed.
        zero_shot, full: whether these rows are there.
        failed: of the trained runs, the last so many were set aside.
        missing: and so many before them have no result.
    """
    plan = Plan(
        directory=directory,
        effects={ZERO_SHOT: -0.5} | dict(effects or {}),
        forgets=dict(forgets or {}),
        questions=questions,
        seen=tuple(seen),
        tasks=tuple(tasks),
        seed_sd=seed_sd,
        transfers=transfers,
        curve=curve,
        epochs=epochs,
    )
    trained = [*methods, FULL] if full else [*methods]
    levels: dict[str, Sequence[str]] = {"method": trained, "task": tasks, **(axes or {})}
    if len(connectors) > 1:
        levels["connector"] = connectors
    runs = list(_search(plan, methods, tasks[0], seeds[0], trials))
    for seed, labels in itertools.product(seeds, itertools.product(*levels.values())):
        factors = dict(zip(levels, labels, strict=True))
        for size in (sizes or {}).get(factors["method"], [NOT_VARIED]):
            runs.append(Run(factors | ({"size": size} if sizes else {}), seed))
    if zero_shot:
        bare = dict.fromkeys([*levels, *(["size"] if sizes else [])], NOT_VARIED)
        runs = [Run(bare | {"method": ZERO_SHOT, "task": task}, seeds[0]) for task in tasks] + runs
    written = len(runs) - failed - missing
    planned = [_write(plan, run, there=place < written) for place, run in enumerate(runs)]
    for each in planned[len(runs) - failed :] if failed else []:
        _write_attempts(directory, each)
    shown = {"method": [*([ZERO_SHOT] if zero_shot else []), *trained], "task": list(tasks), **(axes or {})}
    if len(connectors) > 1:
        shown["connector"] = list(connectors)
    if sizes:
        shown["size"] = list(dict.fromkeys(itertools.chain(*sizes.values())))
    write_index(
        directory,
        Index(
            title=title,
            question="Which method is best, with the connector frozen or tuned?",
            protocol="fair" if trials else "paper",
            facts=[("Seeds", str(len(seeds))), ("Trials of each method", str(trials))],
            contrast="method",
            axes=shown,
            seen=list(seen),
            runs=planned,
            expected=len(planned),
        ),
    )
    return directory


def _search(plan: Plan, methods: Sequence[str], task: str, seed: int, trials: int) -> Iterator[Run]:
    for method in methods:
        for trial in range(trials):
            rate = 1e-4 * 2**trial
            yield Run(
                {"method": method, "task": task},
                seed,
                stage="trial",
                tried=f"learning_rate {rate:g}",
                chosen=trial == trials // 2,
                spec={"train": {"learning_rate": rate}, "scored": "validation"},
            )


# --- one run ---


def _write(plan: Plan, run: Run, *, there: bool) -> Planned:
    spec = _spec(plan, run)
    identity = _identity(spec)
    name = f"runs/{spec['method']['name']}-{spec['task']['name']}-{identity}"
    if there:
        _write_run(plan, run, plan.directory / name, spec, identity)
    return Planned(
        id=identity,
        directory=name,
        stage="trial" if run.stage == "trial" else "final",
        factors=run.factors,
        seed=None if run.is_zero_shot else run.seed,
        tried=run.tried,
        chosen=run.chosen,
        values="learning_rate 0.0002" if run.stage == "final" and not run.is_zero_shot else "",
    )


def _spec(plan: Plan, run: Run) -> dict[str, Any]:
    """As result.json holds it; built by the real class once per combination of what it checks."""
    factors = run.factors
    method = {ZERO_SHOT: "none", FULL: "full"}.get(run.method, run.method)
    options = {"size": factors["size"]} if factors.get("size", NOT_VARIED) != NOT_VARIED else {}
    options |= {axis: label for axis, label in factors.items() if axis not in _KNOWN_AXES}
    spec = _plain_spec() | {
        "method": {"name": method, "options": options},
        "connector": factors.get("connector", "frozen").replace(NOT_VARIED, "frozen"),
        "task": {"name": run.factors["task"], "options": {"seed": 1}},
        "evaluate": [{"name": name, "options": {"seed": 1}} for name in _scored(plan, run)[1:]],
        "seed": run.seed,
        "name": run.method,
    }
    spec["train"] = {**spec["train"], "num_train_epochs": float(plan.epochs), **run.spec.get("train", {})}
    return spec | {key: value for key, value in run.spec.items() if key != "train"}


_KNOWN_AXES = {"method", "task", "connector", "size", "model", "seed"}
_PLAIN: dict[str, Any] = {}


def _plain_spec() -> dict[str, Any]:
    if not _PLAIN:
        _PLAIN.update(Spec(method="lora", task="scenes_next", output_dir="runs").model_dump(mode="json"))  # type: ignore[arg-type]
    return dict(_PLAIN)


def _identity(spec: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _scored(plan: Plan, run: Run) -> list[str]:
    """The trained task first; a trial is scored on nothing else."""
    own = run.factors["task"]
    if run.stage == "trial":
        return [own]
    others = plan.tasks if plan.transfers else ()
    return list(dict.fromkeys([own, *others, *plan.seen]))


def _write_run(plan: Plan, run: Run, directory: Path, spec: Mapping[str, Any], identity: str) -> None:
    (directory / "predictions").mkdir(parents=True)
    tasks = _scored(plan, run)
    abilities = {task: _ability(plan, run, task) for task in tasks}
    split = "validation" if run.stage == "trial" else "test"
    scores = {
        task: _write_answers(directory, f"predictions/{task}.jsonl", plan, run, task, ability, split)
        for task, ability in abilities.items()
    }
    trained = not run.is_zero_shot
    best = max(1, plan.epochs - plan.curve - 1) if plan.curve else plan.epochs
    losses = _losses(run, best, plan.epochs)
    content = _result(plan, run, spec, identity) | {"scores": scores}
    if trained:
        content["training"]["best"] = {
            "step": best * STEPS_PER_EPOCH,
            "eval_loss": losses[best - 1],
            "restored": best != plan.epochs,
        }
        content["curve"] = (
            list(_curve(plan, run, directory, scores, abilities, best, losses)) if run.stage == "final" else []
        )
        _write_metrics(directory / "metrics.jsonl", run, losses)
    content["sha256"] = json_digest(content)
    (directory / "result.json").write_text(json.dumps(content, ensure_ascii=False) + "\n")


def _result(plan: Plan, run: Run, spec: Mapping[str, Any], identity: str) -> dict[str, Any]:
    """All but scores and curve."""
    method, trained = spec["method"]["name"], not run.is_zero_shot
    parameters, seconds = _parameters(run), _seconds(run)
    tuned = spec["connector"] == "tuned" and trained
    trainable = {"llm": {"parameters": parameters, "learning_rate": 2e-4}} if trained else {}
    if tuned:
        trainable["connector"] = {"parameters": CONNECTOR, "learning_rate": 2e-5}
    tokens = 39_470 * plan.epochs
    training = {
        "steps": STEPS_PER_EPOCH * plan.epochs,
        "epochs": float(plan.epochs),
        "seconds": seconds * (1.2 if tuned else 1.0) * plan.epochs / 3,
        "tokens": tokens,
        "sequence_tokens": 2 * tokens,
        "images": 512 * plan.epochs * 4,
        "answer_tokens": 5_373 * plan.epochs,
        "tokens_per_second": tokens / seconds,
        "best": None,
        "stopped_early": False,
        "resumed": 0,
    }
    account = {"task": run.factors["task"], "read": 2048, "used": 2048, "quarantined": 0, "fingerprint": "8e33"}
    return {
        "spec_sha256": hashlib.sha256(identity.encode()).hexdigest(),
        "schema": 1,
        "name": run.method,
        "spec": spec,
        "spec_id": identity,
        "method": {"name": method, "location": "both" if method == "lora" else None, "options": {"rank": 8}},
        "model": {
            "source": run.factors.get("model", "embedded"),
            "family": "llava",
            "parameters": LLM + CONNECTOR + VISION,
            "fingerprint": "e7b11febf3a38f97b6d531489284dd1a7ebace74db9f0633887fafbfe8144463",
            "embeddings": 32_768,
            "layers": 4,
            "width": 128,
            "patches": 17,
            "parts": {"llm": LLM - 32_768, "lm_head": 32_768, "connector": CONNECTOR, "vision": VISION, "elsewhere": 0},
        },
        "trainable": trainable,
        "data": {"train": account} if trained else {},
        "training": training if trained else {},
        "self_check": None,
        "adapter": {"directory": "adapter", "bytes": 4 * parameters + 2_000} if trained else None,
        "retention": {},
        "curve": [],
        "peak_memory_bytes": 640_000_000 + 16 * parameters,
        "environment": {"peft-mllm": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7", "device": "cpu", "threads": 2},
        "processes": 1,
        "seed": run.seed,
        "notes": [],
    }


def _parameters(run: Run) -> int:
    if run.is_zero_shot:
        return 0
    size = "".join(letter for letter in run.factors.get("size", "") if letter.isdigit())
    known = TRAINABLE.get(run.method, 1_000 + _number(run.method) % 40_000)
    return known * int(size) // 8 if size else known


def _seconds(run: Run) -> float:
    """Of three epochs; two runs alike never take equally long."""
    jitter = 1 + _number("seconds", *run.factors.values(), str(run.seed)) % 1000 / 20_000
    return SECONDS.get(run.method, 15 + _number(run.method) % 20) * jitter


# --- scores ---


def _ability(plan: Plan, run: Run, task: str) -> float:
    """In logits, above the mean difficulty: what the labels do, and what this seed does to this task."""
    labels = list(run.factors.values())
    known = sum(effect for label, effect in plan.effects.items() if set(label.split("+")) <= set(labels))
    shift = 0.0 if run.is_zero_shot else plan.seed_sd * _normal("seed", task, *labels, str(run.seed), run.tried)
    if task == run.factors["task"]:
        return 1.0 + known + shift
    if task in plan.seen:
        return 2.0 + shift / 2 - (0.0 if run.is_zero_shot else 0.3 + plan.forgets.get(run.method, 0.0))
    return 0.3 + known / 3 + shift


def _write_answers(
    directory: Path, file: str, plan: Plan, run: Run, task: str, ability: float, split: str
) -> dict[str, Any]:
    difficulty = _difficulty(task, plan.questions)
    luck = _generator("luck", task, file, *run.factors.values(), str(run.seed), run.tried).logistic(
        scale=0.35, size=plan.questions
    )
    right = ability - difficulty + luck > 0
    (directory / file).parent.mkdir(exist_ok=True)
    (directory / file).write_text("".join(map(_line, _stems(task, split, plan.questions), right.tolist())))
    return {
        "split": split,
        "metric": "exact",
        "rule": "exact match in lower case, without surrounding space (per cent)",
        "n": plan.questions,
        "unparsed": 0,
        "values": {"accuracy": 100 * float(right.mean())},
        "seconds": 1.1,
        "predictions": file,
        "prompt_tokens": 90 * plan.questions,
        "new_tokens": 4 * plan.questions,
    }


def _line(stem: tuple[str, str, str], right: bool) -> str:
    head, answer, wrong = stem
    said = answer if right else wrong
    return f'{head}"prediction": "{said}", "answer": "{answer}", "score": {float(right)}, "parsed": "{said}"}}\n'


_STEMS: dict[tuple[str, str, int], list[tuple[str, str, str]]] = {}


def _stems(task: str, split: str, questions: int) -> list[tuple[str, str, str]]:
    """Per question: the line's beginning, the answer, and a wrong one."""
    if (task, split, questions) not in _STEMS:
        colours = ("red", "green", "blue", "white")
        _STEMS[task, split, questions] = [
            (
                f'{{"id": "{split}-{1 + i // 4}-{i % 4}", "question": "What is right of place {i} ({task})?", ',
                f"{colours[i % 4]} cross",
                f"{colours[(i + 1 + i // 4) % 4]} square",
            )
            for i in range(questions)
        ]
    return _STEMS[task, split, questions]


_DIFFICULTIES: dict[tuple[str, int], NDArray[np.float64]] = {}


def _difficulty(task: str, questions: int) -> NDArray[np.float64]:
    if (task, questions) not in _DIFFICULTIES:
        _DIFFICULTIES[task, questions] = _generator("difficulty", task).logistic(scale=0.9, size=questions)
    return _DIFFICULTIES[task, questions]


# --- the curve ---


def _losses(run: Run, best: int, epochs: int) -> list[float]:
    """Validation loss after each epoch, lowest at `best`."""
    floor = (
        0.3 + _number("floor", run.method) % 100 / 500 + 0.01 * _normal("loss", *run.factors.values(), str(run.seed))
    )
    return [
        floor + (2.0 * math.exp(-1.5 * epoch) - 2.0 * math.exp(-1.5 * best) if epoch < best else 0.02 * (epoch - best))
        for epoch in range(1, epochs + 1)
    ]


def _curve(
    plan: Plan,
    run: Run,
    directory: Path,
    final: Mapping[str, Any],
    abilities: Mapping[str, float],
    best: int,
    losses: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """The best evaluation, whose weights are the final ones, and those after it: scores fall from point to point."""
    for after in range(min(plan.curve, plan.epochs - best) + 1 if plan.curve else 0):
        step = (best + after) * STEPS_PER_EPOCH
        falls = {task: 0.1 if task == run.factors["task"] else 0.25 for task in abilities}
        folder = f"predictions/step-{step:08d}"
        yield {
            "step": step,
            "epoch": float(best + after),
            "eval_loss": losses[best + after - 1],
            "best": after == 0,
            "scores": {
                task: _write_answers(
                    directory, f"{folder}/{task}.jsonl", plan, run, task, ability - falls[task] * after, "test"
                )
                for task, ability in abilities.items()
            }
            if after
            else final,
        }


def _write_metrics(file: Path, run: Run, losses: Sequence[float]) -> None:
    epochs, seconds = len(losses), _seconds(run) * len(losses) / 3
    lines: list[dict[str, Any]] = []
    for point in range(1, 4 * epochs + 1):
        step, epoch = point * STEPS_PER_EPOCH // 4, point / 4
        took = seconds * point / (4 * epochs)
        loss = losses[min(int(epoch), epochs - 1)] * (0.9 if epoch >= 1 else 2.5 - epoch)
        lines.append(
            {"step": step, "epoch": epoch, "loss": loss, "learning_rate": 2e-4, "grad_norm": 1.0, "seconds": took}
        )
        if point % 4 == 0:
            lines.append({"step": step, "eval_loss": losses[point // 4 - 1]})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_attempts(directory: Path, planned: Planned) -> None:
    """Three attempts; with the third it was set aside."""
    (directory / "attempts").mkdir(exist_ok=True)
    lines = [
        {
            "time": f"2026-01-01T00:0{attempt}:00Z",
            "host": "one",
            "exit_code": 3,
            "cause": "The loss is not a number.",
            "state": "failed" if attempt < 2 else "set aside",
        }
        for attempt in range(3)
    ]
    (directory / "attempts" / f"{planned.id}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- chance, as a function of names ---


def _number(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:6], "big")


def _generator(*names: str) -> np.random.Generator:
    return np.random.default_rng(_number(*names))


def _normal(*names: str) -> float:
    return float(_generator(*names).normal())
