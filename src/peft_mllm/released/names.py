"""Where the released code's names land in a native model.

The released code wrapped a model that kept its decoder at `model.layers.i` (LLaVA, ShareGPT4V) or `transformer.h.i`
(Qwen-VL), its projector at `model.mm_projector`, and wrote more or fewer wrappers' prefixes in front. What stands
behind them is told here; where the native model keeps it, its anatomy says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from peft_mllm.models.base import Family

# `module.` is distributed training's, `base_model.` and one `model.` peft's, the others the base's
_WRAPPERS = re.compile(r"(module\.)*(base_model\.)?(module\.)*(model\.)*(transformer\.)?")
_IN_A_LAYER = re.compile(r"(?:layers|h)\.(\d+)\.(.+)")
_ADAPTER = re.compile(r"(?P<module>.+)\.(?P<kind>lora_[AB]|ia3_l|adapter_(?:down|up|scaling))(\.weight)?")
_BUFFER = re.compile(r"(.+\.)?(inv_freq|position_ids)")


def plain(name: str) -> str:
    """A tensor's name without wrappers: `layers.0.mlp.up_proj.lora_A.weight`, `mm_projector.0.bias`."""
    name = name[_WRAPPERS.match(name).end() :]  # type: ignore[union-attr]  # it also matches nothing
    name = name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
    return re.sub(r"\.default(?=\.|$)", "", name)


def adapter_parts(name: str) -> tuple[str, str] | None:
    """The module and the kind that a plain name is made of, where it is an adapter's."""
    found = _ADAPTER.fullmatch(name)
    return (found["module"], found["kind"]) if found else None


def is_buffer(name: str) -> bool:
    """Whether a plain name is of a table that every model computes anew."""
    return _BUFFER.fullmatch(name) is not None


class Base:
    """A native model as the place where the released code's names land.

    Attributes:
        family: the loaded model.
        modules: its modules by path.
        parameters: its parameters by path.
    """

    def __init__(self, family: Family):
        self.family = family
        self.anatomy = family.anatomy
        self.modules: dict[str, nn.Module] = dict(family.model.named_modules())
        self.parameters: dict[str, Tensor] = dict(family.model.named_parameters(remove_duplicate=False))
        self.embeddings = self._path_of(family.model.get_input_embeddings())

    def module(self, name: str) -> str | None:
        """The native path of a module with this plain name; None where there is none."""
        return next((path for path in self._candidates(name) if path in self.modules), None)

    def parameter(self, name: str) -> str | None:
        """Likewise of a parameter."""
        module, _, leaf = name.rpartition(".")
        # what was a bare parameter may be a module with one weight here
        paths = [f"{self.module(module)}.{leaf}", f"{self.module(name)}.weight"]
        return next((path for path in paths if path in self.parameters), None)

    def opened(self, parameter: str) -> str | None:
        """The module that PEFT keeps as a whole when this parameter was trained; None where none may be."""
        whole = (*self.anatomy.connector, self.embeddings, self.anatomy.lm_head)
        return next((module for module in whole if parameter.startswith(f"{module}.")), None)

    def decoder_linears(self) -> dict[str, str]:
        """Native path -> plain name, of the linears in the decoder's layers."""
        layers = f"{self.anatomy.layers}."
        return {
            path: path.removeprefix(layers)
            for path, module in self.modules.items()
            if path.startswith(layers) and isinstance(module, nn.Linear)
        }

    def role(self, path: str) -> str | None:
        """The role of a linear in the decoder's layers."""
        inside = path.removeprefix(f"{self.anatomy.layers}.").partition(".")[2]
        return next((role for role, place in self.anatomy.roles("both").items() if place == inside), None)

    def _candidates(self, name: str) -> Iterator[str]:
        in_a_layer = _IN_A_LAYER.fullmatch(name)
        if in_a_layer:
            yield f"{self.anatomy.layers}.{in_a_layer[1]}.{in_a_layer[2]}"
        elif name in ("wte", "embed_tokens"):
            yield self.embeddings
        elif name in ("norm", "ln_f"):
            yield self.anatomy.final_norm
        elif name == "lm_head":
            yield self.anatomy.lm_head
        elif name == "mm_projector" or name.startswith("mm_projector."):
            yield from self._projector(name)
        elif name.startswith("vision_tower.vision_tower."):
            inside = name.removeprefix("vision_tower.vision_tower.")
            for tower in self.anatomy.vision:
                yield from (f"{tower}.{inside}", f"{tower}.{inside.removeprefix('vision_model.')}")
        elif name.startswith("visual."):
            yield from (path for path in self.modules if f".{path}".endswith(f".{name}"))

    def _projector(self, name: str) -> Iterator[str]:
        """The n-th linear of the connector for `mm_projector.2n`: an activation stands between two linears."""
        places = {path.rpartition(".")[0] for path in self.parameters if self.anatomy.part_of(path) == "connector"}
        linears = [path for path in self.modules if path in places]
        if not all(isinstance(self.modules[path], nn.Linear) for path in linears):
            return  # this model's connector is no such projector
        number = name.removeprefix("mm_projector").lstrip(".") or "0"
        if number.isdigit() and int(number) % 2 == 0:
            yield from linears[int(number) // 2 : int(number) // 2 + 1]

    def _path_of(self, wanted: nn.Module) -> str:
        return next(path for path, module in self.modules.items() if module is wanted)
