"""Sizes at which methods train about as many parameters, so that a method is not better by being larger.

The count of a method's parameters grows with its size in a straight line (a rank, a bottleneck, virtual tokens), so two
counts on the model without its weights give the size for any budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import SpecError
from peft_mllm.methods import METHODS
from peft_mllm.specfile import build, parse_spec
from peft_mllm.study.axes import Axis, Level, axes_of, flat, method_name, put
from peft_mllm.study.definition import Study
from peft_mllm.study.wording import count

if TYPE_CHECKING:
    from peft_mllm.bare import BareModel
    from peft_mllm.spec import NamedSpec


def matched_axis(study: Study) -> Axis | None:
    """The axis `parameters`: for each method with a size, the size nearest to each budget; None if none is asked for.

    Raises:
        SpecError: the study has several models (a size for one is none for the other), or no budget can be met.
        ModelError: there is no such model.
    """
    if study.matched is None:
        return None
    axes = axes_of(study.axes)
    if "model" in axes and len(axes["model"].levels) > 1:
        raise SpecError("matched: the sizes depend on the model, so a study with matched sizes has one model.")
    from peft_mllm.bare import BareModel

    values: dict[str, Any] = dict(flat(study.fixed)) | {"output_dir": "-", "evaluate": []}
    for axis in ("model", "task"):  # which task is of no account
        values |= axes[axis].levels[0].values if axis in axes else {}
    by_method: dict[str, tuple[Level, ...]] = {}
    bare = None
    for level in axes["method"].levels:
        if METHODS[method_name(level)].size is None:
            continue
        data: dict[str, Any] = {}
        put(data, {**values, **level.values})
        spec = parse_spec(data)
        bare = bare or BareModel.of(spec.model)
        by_method[level.label] = tuple(_levels(bare, spec.method, study.matched.parameters))
    return Axis("parameters", by_method=by_method)


def _levels(bare: BareModel, method: NamedSpec, budgets: tuple[int, ...]) -> Iterator[Level]:
    one, two = (_parameters(bare, method, size) for size in (1, 2))
    step = two - one
    for budget in budgets:
        size = max(1, round((budget - one) / step) + 1) if step else 1
        if one > 2 * budget:
            raise SpecError(
                f"matched.parameters: {method.name} trains {one:,} parameters at its smallest, not {budget:,}. "
                "Ask for more, or leave the method out."
            )
        yield Level(f"about {count(budget)}", {f"method.{key}": v for key, v in _sized(method, size).items()})


def _parameters(bare: BareModel, method: NamedSpec, size: int) -> int:
    options: Mapping[str, Any] = {**method.options, **_sized(method, size)}
    return sum(bare.trained(build(METHODS, method.model_copy(update={"options": options}))).values())


def _sized(method: NamedSpec, size: int) -> dict[str, Any]:
    return build(METHODS, method).sized(size)
