"""The facts of a model as tables for a person."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peft_mllm.inspection.facts import Facts


def page(facts: Facts) -> RenderableType:
    """All facts, in the order in which a person asks for them."""
    return Group(
        Text(f"{facts.path}: {facts.architecture}, family '{facts.family}', {facts.parameters:,} parameters\n"),
        _parts(facts),
        Text(),
        _linears(facts),
        Text(),
        *(Text(line) for line in _sentences(facts)),
        Text(),
        _chat(facts),
        Text(),
        _costs(facts),
    )


def _table(title: str, *headings: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return table


def _parts(facts: Facts) -> Table:
    table = _table("Parts", "part", "parameters", "modules", numbers=("parameters",))
    for part in facts.parts:
        table.add_row(part.name, f"{part.parameters:,}", Text(", ".join(shortened(part.modules))))
    return table


def _linears(facts: Facts) -> Table:
    path, count = facts.layers
    table = _table(
        f"Linears of {path}.0 to {count - 1}", "role", "path", "inputs x outputs", "layers", numbers=("layers",)
    )
    for each in facts.linears:
        for inputs, outputs, layers in each.shapes:
            table.add_row(each.role, each.path, f"{inputs} x {outputs}", str(layers))
    return table


def _sentences(facts: Facts) -> Iterator[str]:
    attention = facts.attention
    window = f", a window of {attention['window']}" if attention["window"] else ""
    yield (
        f"Attention: {attention['heads']} heads of width {attention['head_width']}, "
        f"{attention['key_value_heads']} of keys and values, backend {attention['backend']}{window}."
    )
    for kind, count in facts.other_layers.items():
        yield f"Of these {kind} ({count}) has another attention, which stays frozen; its linears at these paths do not."
    yield f"Normalisations: {', '.join(facts.norms)}."
    yield "Positions: " + ("one for each token." if facts.axes == 1 else f"{facts.axes} axes for each token.")
    yield (
        "Trees: samples of one image share it."
        if facts.trees
        else "Trees: no. Tokens look ahead here, or the backend takes no such mask: each sample is a row of its own."
    )
    sizes = ", ".join(f"{tokens} for {size}" for size, tokens in facts.image_tokens.items())
    yield f"Tokens of an image: {sizes}."
    yield f"An answer ends with: {' or '.join(facts.stops)}."
    yield from (f"Note: {note}" for note in facts.notes)


def _chat(facts: Facts) -> Group:
    said = Text()
    for stretch, learned in facts.chat:
        said.append(f"⟦{stretch}⟧" if learned else stretch, style="bold green" if learned else "")
    return Group(Text("A conversation as it is read; what is learned stands in ⟦ ⟧", style="bold"), said)


def _costs(facts: Facts) -> Table:
    sizes = {part.name: part.parameters for part in facts.parts}
    llm = sizes["llm"] + sizes["lm_head"]
    table = _table(
        "What each method trains with its usual options", "method", "location", "parameters", "of the language model",
        "with the connector", numbers=("parameters", "of the language model", "with the connector"),
    )  # fmt: skip
    for cost in facts.costs:
        if cost.parameters is None:
            table.add_row(cost.method, cost.location, "-", Text(cost.why), "")
        else:
            share, both = 100 * cost.parameters / llm, cost.parameters + sizes["connector"]
            table.add_row(cost.method, cost.location, f"{cost.parameters:,}", f"{share:.3f} %", f"{both:,}")
    return table


def shortened(paths: Iterable[str]) -> list[str]:
    """Paths that differ in one last number as one: `blocks.0`, `blocks.1`, `blocks.2` as `blocks.0 to 2`."""
    short: list[str] = []
    runs: dict[str, tuple[int, int]] = {}
    for path in paths:
        found = re.fullmatch(r"(.+)\.(\d+)", path)
        if not found:
            short.append(path)
            continue
        first, last = runs.get(found[1], (int(found[2]), int(found[2]) - 1))
        if last + 1 != int(found[2]):
            short.append(path)
            continue
        runs[found[1]] = (first, last + 1)
        if first == last + 1:
            short.append(found[1])
    return [f"{each}.{_range(*runs[each])}" if each in runs else each for each in short]


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
