"""What a run is in the paper's terms: its model, method, setting and task, whatever a study calls them.

Read from the run's spec where there is one. A line of an imported table has labels only, and they are taken as they
are: a method called `LoRA r=128` is lora.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_mllm.study.outcomes import Outcome

PAPER_METHODS = ("adapter", "lora", "ia3", "prefix")
"""In the paper's order."""
NO_PEFT = ("", "none", "full")
"""Names on the shelf, and none, that are no parameter-efficient method."""

# the paper's own choice, which its rows have where they do not say otherwise
LOCATIONS = {"adapter": "mlp", "lora": "both", "ia3": "both"}
SIZES = {"adapter": 256.0, "lora": 128.0, "prefix": 20.0}
RATES = {"adapter": 5e-5, "lora": 2e-4, "ia3": 2e-4, "prefix": 1e-5}

_SIZE_OPTIONS = ("rank", "bottleneck", "virtual_tokens")
_POSITIONS = ("before", "after", "parallel")
# the study's random 20,000 of two large data sets are its whole training set (Table 8)
_WHOLE = {"ocrvqa": 20_000, "vqav2": 20_000}

_TASKS = {
    "scienceqa": ("scienceqa", "sqa", "sqaimg"),
    "vizwiz": ("vizwiz", "vizwizvqa"),
    "iconqa_txt": ("iconqatxt", "icontxt"),
    "iconqa_blank": ("iconqablank", "iconblank"),
    "flickr30k": ("flickr30k", "flickr"),
    "okvqa": ("okvqa",),
    "ocrvqa": ("ocrvqa",),
    "vqav2": ("vqav2",),
}


@dataclass(frozen=True)
class Setting:
    """One run's place in the paper's tables; None and empty where it is not known.

    Attributes:
        model: as the paper calls it; empty for a model that it does not have.
        method: name on the methods shelf; a variant that the paper does not have (DoRA, another place of adapters,
            any other method of peft) goes by its label.
        connector: frozen, tuned or released.
        location: attention, mlp or both; empty for a method without places.
        size: rank, bottleneck or virtual tokens.
        data_size: training samples asked for; None is all.
        learning_rate: of the method's parameters.
        task: name on the tasks shelf that it was trained on.
    """

    model: str = ""
    method: str = ""
    connector: str = ""
    vision: str = ""
    location: str = ""
    size: float | None = None
    data_size: int | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    task: str = ""


def setting_of(outcome: Outcome) -> Setting:
    """The setting of a run, from its spec, else from the labels of its factors."""
    labels = outcome.factors
    if outcome.result is None:
        return _from_labels(labels)
    result = outcome.result
    spec = result.spec
    name = result.method.name
    options = {**_mapping(_mapping(spec.get("method")).get("options")), **result.method.options}
    train = _mapping(spec.get("train"))
    llm = result.trainable.get("llm")
    method = labels.get("method", result.name) if _is_variant(name, options) else name
    task = _named(spec.get("task")) or canonical_task(labels.get("task", ""))
    return Setting(
        model=paper_model(result.model.source) or paper_model(labels.get("model", "")),
        method=method,
        connector=str(spec.get("connector") or _plain(labels.get("connector", "frozen"))),
        vision=str(spec.get("vision") or _plain(labels.get("vision", "frozen"))),
        location=_location(method, result.method.location, options),
        size=next((float(options[key]) for key in _SIZE_OPTIONS if options.get(key) is not None), None),
        data_size=_data_size(task, spec),
        learning_rate=train.get("learning_rate") or (llm.learning_rate if llm else None),
        epochs=train.get("num_train_epochs"),
        task=task,
    )


def paper_model(source: str) -> str:
    """The paper's name of a model, from a hub id, a directory or a label; empty for any other.

    `liuhaotian/llava-v1.5-7b`, `llava-hf/llava-1.5-7b-hf`, `models/llava-1.5-7b` are LLaVA-1.5-7B.
    """
    text = re.sub(r"[^a-z0-9]+", "", source.lower())
    if "sharegpt4v" in text:
        return "ShareGPT4V-7B" if "13b" not in text else ""
    if "qwenvlchat" in text:
        return "Qwen-VL-Chat"
    found = re.search(r"llavav?15(7b|13b)", text)
    return f"LLaVA-1.5-{found[1].upper()}" if found else ""


def canonical_task(name: str) -> str:
    """The shelf's name of one of the paper's data sets; any other name as it is."""
    text = re.sub(r"[^a-z0-9]+", "", name.lower())
    return next((task for task, known in _TASKS.items() if text in known), name)


def canonical_method(label: str) -> str:
    """The shelf's name of a method from its label; any other label as it is."""
    text = label.lower()
    if "full" in text:
        return "full"
    return next((name for name in PAPER_METHODS if name in text.replace("-", "").replace("^", "")), text)


def number(value: float) -> str:
    """`0.0002`, `128`: a size or a rate as a person reads it."""
    return f"{value:g}"


def first_number(text: str) -> float | None:
    """The first number in a label: `rank 16` is 16, `1e-4` is 0.0001; `1k` is 1000."""
    found = re.search(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", text.lower().replace(",", ""))
    if not found:
        return None
    thousand = text.lower().replace(",", "")[found.end() :].strip().startswith("k")
    return float(found[0]) * (1000 if thousand else 1)


def _from_labels(labels: Mapping[str, str]) -> Setting:
    method = canonical_method(labels.get("method", ""))
    size, data, rate = (first_number(labels.get(axis, "")) for axis in ("size", "data_size", "learning_rate"))
    return Setting(
        model=paper_model(labels.get("model", "")),
        method=method,
        connector=_plain(labels.get("connector", "")),
        vision=_plain(labels.get("vision", "")),
        location=_plain(labels.get("location", "")) or LOCATIONS.get(method, ""),
        size=SIZES.get(method) if size is None else size,
        data_size=None if data is None else int(data),
        learning_rate=rate,
        task=canonical_task(labels.get("task", "")),
    )


def _is_variant(name: str, options: Mapping[str, Any]) -> bool:
    if name == "lora":
        return bool(options.get("rslora") or options.get("dora")) or options.get("init", "default") != "default"
    if name == "adapter":
        return options.get("preset", "paper") != "paper" or any(options.get(key) for key in _POSITIONS)
    return name == "peft"


def _location(method: str, said: str | None, options: Mapping[str, Any]) -> str:
    place = said or options.get("location")
    return str(place or LOCATIONS[method]) if method in LOCATIONS else ""


def _data_size(task: str, spec: Mapping[str, Any]) -> int | None:
    asked = [
        _mapping(spec.get("data")).get("max_train_samples"),
        _mapping(_mapping(spec.get("task")).get("options")).get("train_size"),
    ]
    sizes = [int(size) for size in asked if size is not None and size != _WHOLE.get(task)]
    return min(sizes) if sizes else None


def _plain(label: str) -> str:
    """`connector tuned`, `Tuned` are `tuned`; a label with none of the words is empty."""
    words: Sequence[str] = ("frozen", "tuned", "released", "attention", "mlp", "both")
    return next((word for word in words if word in label.lower()), "")


def _named(said: Any) -> str:
    return str(_mapping(said).get("name") or (said if isinstance(said, str) else ""))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
