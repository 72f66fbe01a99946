"""Each tensor of a released adapter in its place in a native model, or an error that names those without one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_mllm.errors import ModelError
from peft_mllm.released.files import Released, Stored
from peft_mllm.released.names import Base, adapter_parts, is_buffer

TABLE, ENCODER = "prompt_embeddings", "prompt_encoder."
SHOWN = 5
"""How many names an error lists."""


@dataclass
class Landed:
    """A released adapter on a base.

    Attributes:
        linears: native path of a linear -> kind (lora_A, ia3_l, ...) -> its tensor.
        originals: native path of a linear -> the released code's plain name of it.
        opened: native parameter -> its trained value.
        modules: the modules that those parameters make up.
        table: of prefix tuning.
        encoder: what the table was computed from in training.
        unused: why -> tensors that are not needed.
    """

    linears: dict[str, dict[str, Stored]] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    opened: dict[str, Stored] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    table: Stored | None = None
    encoder: dict[str, Stored] = field(default_factory=dict)
    unused: dict[str, list[Stored]] = field(default_factory=dict)


def land(released: Released, base: Base) -> Landed:
    """Find the place of every tensor.

    Raises:
        ModelError: some have none; or a part that was trained is not there as a whole; or weights that are not the
            adapter's differ from this base's, which is then not the one it was trained on.
    """
    landed = Landed()
    homeless: list[Stored] = []
    for stored in released.stored:
        parts = adapter_parts(stored.plain)
        if parts:
            path = base.module(parts[0])
            if path is None:
                homeless.append(stored)
            else:
                landed.linears.setdefault(path, {})[parts[1]] = stored
                landed.originals[path] = parts[0]
        elif stored.plain == TABLE:
            landed.table = stored
        elif stored.plain.startswith(ENCODER):
            landed.encoder[stored.plain.removeprefix(ENCODER)] = stored
        elif not _land_parameter(stored, base, landed):
            homeless.append(stored)
    if homeless:
        raise ModelError(
            f"{released.directory}: {listed(homeless)} of this adapter have no place in "
            f"{base.family.model.name_or_path}. Nothing was written. Give the base that it was trained on."
        )
    _open_whole_modules(base, landed)
    return landed


def _land_parameter(stored: Stored, base: Base, landed: Landed) -> bool:
    """Place a tensor of the base's own: trained, or a copy of what the base has. False where it has no place."""
    if is_buffer(stored.plain):
        landed.unused.setdefault("tables that every model computes anew", []).append(stored)
        return True
    path = base.parameter(stored.plain)
    if path is None:
        return False
    if stored.tensor.numel() == 0:
        landed.unused.setdefault("empty: what ZeRO leaves of weights that it keeps elsewhere", []).append(stored)
        return True
    own = base.parameters[path]
    if own.shape != stored.tensor.shape:
        raise ModelError(
            f"{stored.file}: {stored.name} is {shape(stored.tensor)}, but this base's {path} is {shape(own)}. "
            "Give the base that it was trained on."
        )
    module = base.opened(path)
    if module in base.anatomy.connector or (module and not _same(stored.tensor, own)):
        landed.opened[path] = stored
    elif _same(stored.tensor, own):
        landed.unused.setdefault("the base's own weights, unchanged", []).append(stored)
    else:
        raise ModelError(
            f"{stored.file}: {stored.name} is no adapter's, and differs from this base's {path}. Either the adapter "
            "was trained on another base, or weights that PEFT cannot keep were trained with it."
        )
    return True


def _open_whole_modules(base: Base, landed: Landed) -> None:
    """PEFT keeps whole modules, so all of a module's parameters must be there."""
    for path in landed.opened:
        module = base.opened(path)
        assert module is not None, "only parameters of such modules are opened"
        if module not in landed.modules:
            landed.modules.append(module)
    missing = [
        path
        for module in landed.modules
        for path in base.parameters
        if path.startswith(f"{module}.") and path not in landed.opened
    ]
    if missing:
        raise ModelError(
            f"Of {', '.join(landed.modules)} only a part is there: {names(missing)} not. Is a file incomplete?"
        )


def _same(stored: Tensor, own: Tensor) -> bool:
    """Whether a stored tensor is the base's own, to the precision that it was stored in."""
    own = own.detach().cpu()
    return torch.equal(own.to(stored.dtype).float(), stored.float())


def shape(tensor: Tensor) -> str:
    """(4, 64) as people read it: 4 x 64."""
    return " x ".join(map(str, tensor.shape)) or "a number"


def names(of: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(of)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def listed(stored: Sequence[Stored]) -> str:
    """How many tensors, and the first by name and file."""
    some = names(f"{each.name} ({each.file})" for each in stored)
    return f"{len(stored)} tensor{'s' * (len(stored) > 1)} [{some}]"
