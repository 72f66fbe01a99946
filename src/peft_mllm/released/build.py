"""A released adapter as PEFT configuration and tensors, by kind; its own configuration is held against its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peft_mllm.methods.bottleneck import BottleneckConfig
from peft_mllm.released.case import (
    Case,
    adapter_tensors,
    check_biases,
    check_shape,
    check_targets,
    fields_of,
    is_named,
    pattern_of,
    roles_of,
    widths,
)
from peft_mllm.released.files import CONFIG, Released
from peft_mllm.released.landing import Landed, names, shape
from peft_mllm.released.names import Base, plain

RECIPE_DROPOUT = 0.05
"""Of the released scripts: what a file of tensors alone does not tell."""
_BEFORE, _AFTER = ("q", "k", "v", "gate", "up"), ("o", "down")
"""Where the released code puts a serial bottleneck, by the linear's role; it never says so in the file."""
_KINDS = {
    "LORA": {"lora_A", "lora_B"},
    "IA3": {"ia3_l"},
    "BOTTLENECK": {"adapter_down", "adapter_up", "adapter_scaling"},
}


@dataclass(frozen=True)
class Built:
    """What becomes of an adapter.

    Attributes:
        config: for adapter_config.json.
        tensors: for adapter_model.safetensors, by PEFT's names.
        method: its name on our shelf.
        options: of that method, as far as the adapter tells them.
        notes: what a user should know.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    method: str
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def build(released: Released, landed: Landed, base: Base, *, lora_alpha: float | None) -> Built:
    """Make the PEFT form of an adapter.

    Args:
        released: what was read.
        landed: the same, in its places.
        base: the model.
        lora_alpha: of a LoRA whose configuration is lost.

    Raises:
        ModelError: configuration, tensors and base do not agree, or something cannot be known.
    """
    case = Case(released, landed, base, lora_alpha)
    kind = _kind(case)
    if lora_alpha is not None and (kind != "LORA" or released.config):
        raise case.wrong(f"--lora-alpha has no effect: {CONFIG} says it, or this is no LoRA.")
    built = _BUILDERS[kind](case)
    check_biases(case)
    for module in case.config.get("modules_to_save") or ():
        if not any(f".{stored.plain}".find(f".{plain(module)}.") >= 0 for stored in landed.opened.values()):
            raise case.wrong(f"{CONFIG} says that {module} was trained, but none of its tensors is there.")
    built.config.base_model_name_or_path = base.family.model.name_or_path
    built.config.inference_mode = True
    built.config.modules_to_save = list(landed.modules) or None
    # peft wraps the base once for prompts, twice for what replaces its layers
    root = "base_model" if kind == "PREFIX_TUNING" else "base_model.model"
    opened = {f"{root}.{path}": stored.tensor for path, stored in landed.opened.items()}
    return Built(built.config, {**built.tensors, **opened}, built.method, built.options, built.notes)


def _kind(case: Case) -> str:
    there = {kind for linear in case.landed.linears.values() for kind in linear}
    found = {kind for kind, parts in _KINDS.items() if parts & there}
    if case.landed.table or case.landed.encoder:
        found.add("PREFIX_TUNING")
    if not found:
        raise case.wrong("there is no adapter in it. A projector alone cannot be a PEFT directory.")
    if len(found) > 1:
        raise case.wrong(f"it holds tensors of {' and '.join(sorted(found))} together.")
    kind = found.pop()
    if case.released.config is None and kind == "BOTTLENECK":
        raise case.wrong(f"a bottleneck adapter cannot be told from its tensors alone: its {CONFIG} is missing.")
    if case.released.config is not None and case.config["peft_type"] != kind:
        raise case.wrong(f"{CONFIG} says {case.config['peft_type']}, but its tensors are those of {kind}.")
    return kind


def _lora(case: Case) -> Built:
    known = fields_of(case, "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    check_targets(case, {"lora_A", "lora_B"})
    ranks = {linear["lora_A"].tensor.shape[0] for linear in case.landed.linears.values()}
    if len(ranks) > 1 or ("r" in known and {known["r"]} != ranks):
        said = f"{CONFIG} says {known['r']}" if "r" in known else "there is no configuration"
        raise case.wrong(f"its tensors have rank {', '.join(map(str, sorted(ranks)))}, and {said}.")
    rank = ranks.pop()
    for path, linear in case.landed.linears.items():
        width_in, width_out = widths(case, path)
        check_shape(case, linear["lora_A"], (rank, width_in), path)
        check_shape(case, linear["lora_B"], (width_out, rank), path)
    alpha = known.get("lora_alpha", case.lora_alpha)
    if alpha is None:
        raise case.wrong(
            f"there is no {CONFIG}, and the tensors (rank {rank}) do not tell the scale. Give --lora-alpha; "
            f"the released recipe is twice the rank, {2 * rank}, but only who trained it knows."
        )
    notes = [] if "lora_dropout" in known else [f"The dropout is not told: {RECIPE_DROPOUT} is the recipe's."]
    if not any(linear["lora_B"].tensor.any() for linear in case.landed.linears.values()):
        notes.append("All its B are zero: this LoRA changes nothing.")
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    options = {
        "rank": rank,
        "alpha": alpha,
        "dropout": known.get("lora_dropout", RECIPE_DROPOUT),
        "rslora": bool(known.get("use_rslora")),
    }
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=options["dropout"],
        use_rslora=options["rslora"],
        target_modules=pattern_of(case.base, case.landed.linears),
    )
    return Built(config, adapter_tensors(case), "lora", {**options, "on": roles_of(case)}, notes)


def _ia3(case: Case) -> Built:
    known = fields_of(case, "target_modules", "feedforward_modules")
    check_targets(case, {"ia3_l"})
    inputs = []
    for path, linear in case.landed.linears.items():
        width_in, width_out = widths(case, path)
        vector = linear["ia3_l"]
        if "feedforward_modules" in known:
            on_input = is_named(known["feedforward_modules"], case.landed.originals[path])
        else:  # a row scales the input, a column the output
            on_input = vector.tensor.shape[0] == 1
        check_shape(case, vector, (1, width_in) if on_input else (width_out, 1), path)
        inputs += [path] if on_input else []
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=pattern_of(case.base, case.landed.linears),
        feedforward_modules=pattern_of(case.base, inputs) if inputs else [],
    )
    still = all((linear["ia3_l"].tensor == 1).all() for linear in case.landed.linears.values())
    notes = ["All its vectors are one: this IA3 changes nothing."] if still else []
    return Built(config, adapter_tensors(case), "ia3", {"on": roles_of(case)}, notes)


def _bottleneck(case: Case) -> Built:
    known = fields_of(
        case, "bottleneck_size", "non_linearity", "adapter_dropout", "scaling", "use_parallel_adapter", "target_modules"
    )
    learned = any("adapter_scaling" in linear for linear in case.landed.linears.values())
    if learned != (known.get("scaling", 1.0) == "learned"):
        raise case.wrong(f"{CONFIG} says scaling: {known.get('scaling')}, but its tensors say otherwise.")
    check_targets(case, {"adapter_down", "adapter_up"} | ({"adapter_scaling"} if learned else set()))
    size = known.get("bottleneck_size", 256)
    placed: dict[str, list[str]] = {"before": [], "after": [], "parallel": []}
    for path, linear in case.landed.linears.items():
        position = "parallel" if known.get("use_parallel_adapter") else _serial(case, path)
        placed[position].append(path)
        width_in, width_out = widths(case, path)
        check_shape(case, linear["adapter_down"], (size, width_out if position == "after" else width_in), path)
        check_shape(case, linear["adapter_up"], (width_in if position == "before" else width_out, size), path)
        if learned:
            check_shape(case, linear["adapter_scaling"], (1,), path)
    options = {
        "bottleneck": size,
        "non_linearity": known.get("non_linearity", "tanh"),
        "dropout": float(known.get("adapter_dropout", 0.0)),
        "scaling": known.get("scaling", 1.0),
    }
    if options["non_linearity"] not in ACT2FN:
        raise case.wrong(f"{CONFIG} says non_linearity: {options['non_linearity']}, which transformers does not have.")
    patterns = {position: pattern_of(case.base, paths) for position, paths in placed.items() if paths}
    config = BottleneckConfig(
        task_type="CAUSAL_LM",
        before_modules=patterns.get("before"),
        after_modules=patterns.get("after"),
        parallel_modules=patterns.get("parallel"),
        bottleneck_size=size,
        non_linearity=options["non_linearity"],
        adapter_dropout=options["dropout"],
        scaling=options["scaling"],
    )
    notes = ["The released code computes it in bfloat16 whatever the model's type; here it is float32."]
    if not any(linear["adapter_up"].tensor.any() for linear in case.landed.linears.values()):
        notes.append("All its Up are zero: this adapter changes nothing.")
    where = {position: roles_of(case, paths) for position, paths in placed.items() if paths}
    return Built(config, adapter_tensors(case), "adapter", {**options, **where}, notes)


def _serial(case: Case, path: str) -> str:
    role = case.base.role(path)
    if role not in (*_BEFORE, *_AFTER):
        raise case.wrong(f"the released code puts no serial adapter at {case.landed.originals[path]}.")
    return "before" if role in _BEFORE else "after"


def _prefix(case: Case) -> Built:
    fields_of(case, "num_virtual_tokens", "encoder_hidden_size", "prefix_projection", "num_layers", "token_dim",
            "num_attention_heads", "num_transformer_submodules")  # fmt: skip
    decoder = case.base.family.model.get_submodule(case.base.anatomy.llm).config
    heads = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
    width = heads * (getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads)
    table, notes = _table(case)
    tokens = int(case.config.get("num_virtual_tokens") or table.shape[0])
    if tuple(table.shape) != (tokens, 2 * decoder.num_hidden_layers * width):
        raise case.wrong(
            f"its table is {shape(table)}; {tokens} learned keys and values of this base are "
            f"{tokens} x {2 * decoder.num_hidden_layers * width}."
        )
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        token_dim=width,
        num_attention_heads=heads,
        num_layers=decoder.num_hidden_layers,
        num_transformer_submodules=1,
        encoder_hidden_size=decoder.hidden_size,
        prefix_projection=False,  # the file holds the table itself, as peft writes it
    )
    return Built(config, {"prompt_embeddings": table}, "prefix", {"virtual_tokens": tokens}, notes)


def _table(case: Case) -> tuple[Tensor, list[str]]:
    """The learned keys and values; where they and their encoder are both there, whether they agree."""
    stored = case.landed.table
    computed = _encoded(case) if case.landed.encoder else None
    if stored is None:
        assert computed is not None, "a prefix is its table, its encoder, or both"
        return computed, ["There is no table of keys and values: it was computed from the encoder."]
    if computed is None:
        return stored.tensor, []
    apart = float((stored.tensor.float() - computed).abs().max()) if computed.shape == stored.tensor.shape else None
    # a table in bfloat16 is the encoder's output, rounded
    if apart is not None and apart <= 4 * torch.finfo(stored.tensor.dtype).eps * float(computed.abs().max()):
        return stored.tensor, ["The encoder gives this very table; training can go on from the table."]
    return stored.tensor, [
        f"WARNING: the encoder in {next(iter(case.landed.encoder.values())).file} gives another table "
        f"(largest difference {apart}): one of the files is of another time. The table of {stored.file} is used."
    ]


def _encoded(case: Case) -> Tensor:
    """The encoder's table: an embedding, through Linear, tanh and Linear where there is a projection."""
    weights = {name: stored.tensor.float() for name, stored in case.landed.encoder.items()}
    projection = ["transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias"]
    known = {"embedding.weight", *projection}
    if not weights.keys() <= known or weights.keys() not in ({"embedding.weight"}, known):
        raise case.wrong(f"its prompt_encoder is not the released one: it has {names(sorted(weights))}.")
    hidden = weights["embedding.weight"]
    if len(weights) > 1:
        hidden = torch.tanh(nn.functional.linear(hidden, weights[projection[0]], weights[projection[1]]))
        hidden = nn.functional.linear(hidden, weights[projection[2]], weights[projection[3]])
    return hidden


_BUILDERS: dict[str, Callable[[Case], Built]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "BOTTLENECK": _bottleneck,
    "PREFIX_TUNING": _prefix,
}
