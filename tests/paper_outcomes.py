"""Outcomes with made-up answers whose truth is known, of the paper's models or of any others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from peft_mllm.study.outcomes import Answers, CurvePoint, Outcome
from peft_mllm.study.results import Method, Model, Part, Prediction, Result

SOURCES = {
    "LLaVA-1.5-7B": "liuhaotian/llava-v1.5-7b",
    "LLaVA-1.5-13B": "liuhaotian/llava-v1.5-13b",
    "ShareGPT4V-7B": "Lin-Chen/ShareGPT4V-7B",
    "Qwen-VL-Chat": "Qwen/Qwen-VL-Chat",
    "embedded": "embedded",
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"location": "both", "rank": 128},
    "ia3": {"location": "both"},
    "adapter": {"preset": "paper", "location": None, "bottleneck": 256},
    "prefix": {"virtual_tokens": 20},
}
RATES = {"lora": 2e-4, "ia3": 2e-4, "adapter": 5e-5, "prefix": 1e-5}
SIZE_KEYS = {"lora": "rank", "adapter": "bottleneck", "prefix": "virtual_tokens"}
METRICS = {"flickr30k": "caption", "scenes_describe": "listed", "pope": "pope", "mmhal": "mmhal"}

Truth = Callable[[Mapping[str, Any], str], float]
"""The mean score of a run, by its setting and the task that it is scored on."""


def outcome(truth: Truth, *, questions: int = 200, also: Sequence[str] = (), curve: int = 0, **setting: Any) -> Outcome:
    """One run.

    Args:
        truth: mean score, per cent.
        questions: of each task.
        also: tasks that it is scored on beside the trained one.
        curve: points after the lowest validation loss; the setting `point` tells the truth which one it is.
        setting: model, method, connector, vision, location, size, data_size, learning_rate, task, seed; those that are
            given are axes of the study, but for the seed, `unsteady` (its standard deviation in points) and the
            method's `options`.
    """
    own = {
        "model": "embedded",
        "method": "lora",
        "connector": "frozen",
        "vision": "frozen",
        "task": "scenes_next",
        "seed": 1,
    }
    own |= setting
    tasks = [own["task"], *(task for task in also if task != own["task"])]
    points = [
        CurvePoint(step, float(step), 1.0, step == 0, _scores(truth, {**own, "point": step}, tasks, questions))
        for step in range(curve + 1)
        if curve
    ]
    scores = _scores(truth, {**own, "point": curve}, tasks, questions)
    factors = {axis: str(value) for axis, value in setting.items() if axis not in ("seed", "unsteady", "options")}
    factors |= {"task": own["task"]}
    return Outcome("run", factors, own["seed"], scores, points, {}, _result(own, scores))


def study(
    truth: Truth, *, seeds: Sequence[int] = (1, 2, 3), settings: Sequence[Mapping[str, Any]], **shared: Any
) -> list[Outcome]:
    """Each setting with each seed."""
    return [outcome(truth, **{**shared, **setting, "seed": seed}) for setting in settings for seed in seeds]


def _scores(truth: Truth, own: Mapping[str, Any], tasks: Sequence[str], questions: int) -> dict[str, Answers]:
    return {task: _answers(truth(own, task), own, task, questions) for task in tasks}


def _answers(mean: float, own: Mapping[str, Any], task: str, questions: int) -> Answers:
    """Graded answers with the mean that the truth says, but for what the seed adds."""
    named = sorted((key, str(value)) for key, value in own.items() if key != "point")
    noise = np.random.default_rng(crc32(f"{named}{task}{own['point']}".encode()))
    base = np.random.default_rng(crc32(task.encode())).normal(0, 20, questions)
    drawn = mean + base - base.mean() + noise.normal(0, 6, questions) + noise.normal(0, own.get("unsteady", 0.3))
    metric = METRICS.get(task, "exact")
    scale = 0.01 if metric in ("caption", "pope") else 1.0
    values = {"headline": float(drawn.mean()) * scale}
    if metric in ("listed", "mmhal"):
        values["hallucination_rate"] = (100 - values["headline"]) * (1 if metric == "listed" else 0.01)
    if metric == "mmhal":
        values |= {"score": values["headline"]}
    ids = tuple(f"{task}-{place}" for place in range(questions))
    return Answers(task, metric, values["headline"], "" if scale < 1 else "%", ids, drawn * scale, values)


def _result(own: Mapping[str, Any], scores: Mapping[str, Answers]) -> Result:
    method = own["method"]
    options = dict(OPTIONS.get(method, {}))
    if own.get("location"):
        options["location"] = own["location"]
    options |= own.get("options", {})
    if own.get("size"):
        options[SIZE_KEYS[method]] = own["size"]
    rate = own.get("learning_rate", RATES.get(method, 2e-5))
    return Result(
        schema=1,
        name=method,
        method=Method(method, options.get("location"), options),
        model=Model(SOURCES[own["model"]], parameters=7_063_000_000),
        spec={
            "method": {"name": method, "options": options},
            "connector": own["connector"],
            "vision": own["vision"],
            "task": {"name": own["task"], "options": {}},
            "data": {"max_train_samples": own.get("data_size")},
            "train": {"learning_rate": rate, "num_train_epochs": 3.0},
        },
        trainable={"llm": Part(own.get("trainable", 201_330_000), rate)},
        predictions={
            task: [Prediction(name, "", "", 0.0, images=("x",) * (place % 2)) for place, name in enumerate(each.ids)]
            for task, each in scores.items()
            if task == "scienceqa"
        },
        seed=own["seed"],
    )
