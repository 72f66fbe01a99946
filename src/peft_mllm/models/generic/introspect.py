"""Where the parts of a model are, found in its config and module tree.

What decides is structure: who holds whom, and the widths that the config names. Names decide only where widths
cannot, as between a query and a key of equal width: `ROLES` and `NORMS` are all the names that are known. A find
that is not the only one is an error that says what to declare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from peft_mllm.anatomy import ATTENTION_ROLES, MLP_ROLES, Anatomy
from peft_mllm.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

ROLES: dict[str, str] = {
    "q_proj": "q", "wq": "q", "query": "q",
    "k_proj": "k", "wk": "k", "key": "k",
    "v_proj": "v", "wv": "v", "value": "v",
    "qkv_proj": "qkv", "query_key_value": "qkv", "qkv": "qkv", "Wqkv": "qkv",
    "o_proj": "o", "out_proj": "o", "wo": "o", "dense": "o",
    "gate_proj": "gate",
    "up_proj": "up", "fc1": "up", "dense_h_to_4h": "up", "c_fc": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down", "fc2": "down", "dense_4h_to_h": "down",
}  # fmt: skip
"""What linears of decoders are called, and their role. Each find is held against the config's widths."""

NORMS: dict[str, tuple[str, ...]] = {
    "attention": ("input_layernorm", "self_attn_layer_norm", "attention_norm", "attn_norm", "norm1", "ln_1"),
    "mlp": (
        "pre_feedforward_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "final_layer_norm", "ffn_norm",
        "norm2", "ln_2",
    ),
}  # fmt: skip
"""The normalisation before attention and before the MLP: the first of these that a layer has."""

WHOLE_ATTENTION = ({"q", "k", "v", "o"}, {"qkv", "o"})
WHOLE_MLP = ({"up", "down"}, {"gate_up", "down"})

OTHER_SENSES = ("audio", "speech")
"""Words in the names of parts that are neither vision nor connector; they stay frozen."""


def anatomy_of(model: PreTrainedModel, declared: Mapping[str, Any] | None = None) -> Anatomy:
    """Find the parts of a model.

    Args:
        model: on any device, the meta device too.
        declared: fields of `Anatomy` that take the place of what would be found.

    Raises:
        ModelError: a part is not found, or in more than one place; names the field to declare.
    """
    return _Search(model, declared or {}).anatomy()


class _Search:
    """The finds in one model."""

    def __init__(self, model: PreTrainedModel, declared: Mapping[str, Any]):
        known = {field.name for field in fields(Anatomy)}
        if unknown := sorted(set(declared) - known):
            raise ModelError(f"model.anatomy has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        self.model = model
        self.declared = declared
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.config: PretrainedConfig = model.config.get_text_config(decoder=True)
        wrong = [path for path in _paths(declared) if path not in self.modules]
        if wrong:
            raise ModelError(
                f"model.anatomy names {', '.join(wrong)}, which this {type(model).__name__} does not have."
            )

    def anatomy(self) -> Anatomy:
        llm = self.declared.get("llm") or self._decoder()
        layers = self.declared.get("layers") or self._layers(llm)
        roles = self._roles(layers)
        attention = self.declared.get("attention") or {r: p for r, p in roles.items() if r in ATTENTION_ROLES}
        mlp = self.declared.get("mlp") or {r: p for r, p in roles.items() if r in MLP_ROLES}
        layer = self._layer_with(layers, attention)
        connector, vision = self._connector_and_vision(llm)
        return Anatomy(
            llm=llm,
            layers=layers,
            self_attention=self.declared.get("self_attention") or _common_parent(attention.values()),
            attention=attention,
            mlp=mlp,
            norms=self.declared.get("norms") or self._norms(layer),
            final_norm=self.declared.get("final_norm") or self._final_norm(llm),
            connector=connector,
            vision=vision,
            lm_head=self.declared.get("lm_head") or self._head(),
            released_connector=tuple(self.declared.get("released_connector", ())),
        )

    def unclear(self, field: str, what: str, found: Iterable[str] = ()) -> ModelError:
        """The error of a find that is none."""
        listed = ", ".join(found) or "nothing"
        return ModelError(
            f"The parts of this {type(self.model).__name__} are not clear: {what}; found: {listed}. "
            f"Say where it is in the spec, as in model: {{path: ..., anatomy: {{{field}: ...}}}}; "
            "`peft-mllm inspect` shows the rest."
        )

    # --- the language model ---

    def _decoder(self) -> str:
        """The module of the text's config that itself holds as many layers as that config says."""
        from transformers import PreTrainedModel

        found = [
            path
            for path, module in self.modules.items()
            if isinstance(module, PreTrainedModel)
            and type(module.config) is type(self.config)
            and self._layer_lists(path)
        ]
        if len(found) != 1:
            raise self.unclear("llm", "one decoder stack is wanted", found)
        return found[0]

    def _layer_lists(self, path: str) -> list[str]:
        """Lists directly in a module with one entry for each layer of the text's config."""
        from torch import nn

        return [
            _join(path, name)
            for name, child in self.modules[path].named_children()
            if isinstance(child, nn.ModuleList)
            and len(child) == self.config.num_hidden_layers
            and any(isinstance(inner, nn.Linear) for inner in child.modules())
        ]

    def _layers(self, llm: str) -> str:
        found = self._layer_lists(llm)
        if len(found) != 1:
            raise self.unclear("layers", "one list of decoder layers is wanted", found)
        return found[0]

    def _roles(self, layers: str) -> dict[str, str]:
        """Role -> path in a layer. Layers may be of several kinds: those with self-attention count.

        Experts in one tensor are no linears; then the MLPs have no roles, shared experts left aside.
        """
        if "attention" in self.declared and "mlp" in self.declared:
            return {}
        children = list(self.modules[layers].children())
        kinds = Counter(tuple(sorted(_linears(layer).items())) for layer in children)
        # most frequent first; a layer that looks across to the images comes last
        ordered = sorted(kinds, key=lambda kind: (any("cross" in path for path, _ in kind), -kinds[kind]))
        for linears in map(dict, ordered):
            roles = self._roles_of(linears)
            if "attention" not in self.declared and not any(whole <= roles.keys() for whole in WHOLE_ATTENTION):
                continue
            if any(parameter.ndim == 3 for layer in children for parameter in layer.parameters()):
                return {role: path for role, path in roles.items() if role in ATTENTION_ROLES}
            self._refuse_half_an_mlp(roles, linears)
            return roles
        what = "a layer's linears q, k, v (or qkv) and o are wanted"
        raise self.unclear("attention", what, _listed(dict(ordered[0])))

    def _refuse_half_an_mlp(self, roles: Mapping[str, str], linears: Mapping[str, tuple[int, int]]) -> None:
        """An MLP has all its linears, or none that look like them."""
        if "mlp" in self.declared or any(whole <= roles.keys() for whole in WHOLE_MLP):
            return
        rest = {path: shape for path, shape in linears.items() if path not in roles.values()}
        like = {path: shape for path, shape in rest.items() if any(self._fits(r, shape) for r in MLP_ROLES)}
        if like or any(role in roles for role in MLP_ROLES):
            what = "a layer's linears up and down, with gate or as gate_up, are wanted"
            raise self.unclear("mlp", what, _listed(linears))

    def _roles_of(self, linears: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """The roles of a layer's linears by name, each with the width that the config gives it."""
        roles: dict[str, str] = {}
        for path, shape in linears.items():
            role = ROLES.get(path.rpartition(".")[2])
            if role is None or not self._fits(role, shape):
                continue
            if role in roles:
                field = "attention" if role in ATTENTION_ROLES else "mlp"
                raise self.unclear(field, f"one linear '{role}' in a layer is wanted", [roles[role], path])
            roles[role] = path
        return {role: roles[role] for role in (*ATTENTION_ROLES, *MLP_ROLES) if role in roles}

    def _fits(self, role: str, shape: tuple[int, int]) -> bool:
        """Whether a linear's (inputs, outputs) are those of a role."""
        config = self.config
        width, heads = config.hidden_size, config.num_attention_heads
        try:
            head = getattr(config, "head_dim", None) or width // heads
            groups = getattr(config, "num_key_value_heads", None) or heads
        except AttributeError as error:  # transformers' way to say that each layer has its own
            raise self.unclear("attention", "the widths of heads differ between layers") from error
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
        wanted = {
            "q": (width, heads * head),
            "k": (width, groups * head),
            "v": (width, groups * head),
            "qkv": (width, (heads + 2 * groups) * head),
            "o": (heads * head, width),
            "gate": (width, inner),
            "up": (width, inner),
            "gate_up": (width, 2 * (inner or 0)),
            "down": (inner, width),
        }
        return shape == wanted[role]

    def _layer_with(self, layers: str, attention: Mapping[str, str]) -> nn.Module:
        for layer in self.modules[layers].children():
            inside = dict(layer.named_modules())
            if all(path in inside for path in attention.values()):
                return layer
        raise self.unclear("attention", f"no layer has all of {', '.join(attention.values())}")

    def _norms(self, layer: nn.Module) -> dict[str, str]:
        there = {name for name, child in layer.named_children() if self._is_norm(child)}
        norms = {place: next((n for n in names if n in there), "") for place, names in NORMS.items()}
        if not all(norms.values()):
            raise self.unclear("norms", "the normalisations before attention and MLP are wanted", sorted(there))
        return norms

    def _final_norm(self, llm: str) -> str:
        found = [_join(llm, name) for name, child in self.modules[llm].named_children() if self._is_norm(child)]
        if len(found) != 1:
            raise self.unclear("final_norm", "one normalisation after the last layer is wanted", found)
        return found[0]

    def _is_norm(self, module: nn.Module) -> bool:
        """Vectors as wide as the model, and nothing else."""
        shapes = {tuple(parameter.shape) for parameter in module.parameters()}
        return shapes == {(self.config.hidden_size,)}

    def _head(self) -> str:
        head = self.model.get_output_embeddings()
        found = [path for path, module in self.modules.items() if module is head]
        if head is None or not found:
            raise self.unclear("lm_head", "the linear from hidden states to logits is wanted")
        return found[0]

    # --- what sees ---

    def _connector_and_vision(self, llm: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        connector, vision = (tuple(self.declared.get(field, ())) for field in ("connector", "vision"))
        if connector and vision:
            return connector, vision
        towers, between = self._beside(llm)
        if len(towers) != 1 and not vision:
            raise self.unclear("vision", "one module that takes pixels is wanted", towers)
        if between:
            return connector or tuple(between), vision or tuple(towers)
        inside = [path for tower in towers for path in self._children(tower) if self._leads_out(path)]
        if not (inside or connector):
            raise self.unclear("connector", "the modules between vision tower and language model are wanted", towers)
        chosen = connector or tuple(inside)
        rest = [path for tower in towers for path in self._children(tower) if path not in chosen]
        return chosen, vision or tuple(rest)

    def _beside(self, llm: str) -> tuple[list[str], list[str]]:
        """The parts beside the decoder: those that take pixels, and the others."""
        eyes = [path for path, module in self.modules.items() if self._takes_pixels(module)]
        if not eyes:
            return [], []
        root = _common_parent([llm, *eyes])
        parts = [path for path in self._children(root) if not _inside(llm, path) and not self._is_head(path)]
        parts = [path for path in parts if not any(sense in path for sense in OTHER_SENSES)]
        towers = [path for path in parts if any(_inside(eye, path) for eye in eyes)]
        return towers, [path for path in parts if path not in towers]

    def _is_head(self, path: str) -> bool:
        return self.modules[path] is self.model.get_output_embeddings()

    def _children(self, path: str) -> list[str]:
        """The direct children of a module that have parameters; of a list its entries, which is what peft can open."""
        from torch import nn

        found: list[str] = []
        for name, child in self.modules[path].named_children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                found += self._children(_join(path, name))
            elif any(True for _ in child.parameters()):
                found.append(_join(path, name))
        return found

    def _takes_pixels(self, module: nn.Module) -> bool:
        """Whether it is a convolution over an image's channels, or a linear over its patches."""
        from torch import nn

        config = getattr(self.model.config, "vision_config", None)
        names = ("num_channels", "in_channels", "in_chans")
        channels = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), 3)
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return module.in_channels == channels
        patch = getattr(config, "patch_size", None)
        if not isinstance(module, nn.Linear) or not isinstance(patch, int):
            return False
        frames = getattr(config, "temporal_patch_size", 1)
        return module.in_features == channels * patch * patch * frames and "patch" in self._name_of(module)

    def _name_of(self, module: nn.Module) -> str:
        return next(path for path, each in self.modules.items() if each is module)

    def _leads_out(self, path: str) -> bool:
        """Whether a part of a tower ends in the language model's width, and is neither its entrance nor a block."""
        inner = [module for name, module in self.modules.items() if _inside(name, path)]
        attends = any("attn" in name or "attention" in name for name in self.modules if _inside(name, path))
        block = path.rpartition(".")[2].isdigit() and attends
        if block or any(self._takes_pixels(module) for module in inner):
            return False
        return self.config.hidden_size in {outputs for module in inner for outputs in _outputs(module)}


def _linears(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> (inputs, outputs) of the linears in a layer."""
    from torch import nn

    return {
        path: (module.in_features, module.out_features)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def _listed(linears: Mapping[str, tuple[int, int]]) -> list[str]:
    """Linears with their widths, for a message."""
    return [f"{path} {inputs} -> {outputs}" for path, (inputs, outputs) in sorted(linears.items())]


def _outputs(module: nn.Module) -> Iterator[int]:
    """The width that a linear or a convolution gives."""
    from torch import nn

    if isinstance(module, nn.Linear):
        yield module.out_features
    elif isinstance(module, nn.Conv2d | nn.Conv3d):
        yield module.out_channels


def _paths(declared: Mapping[str, Any]) -> Iterator[str]:
    """The module paths from the root that are declared; those inside a layer are looked at later."""
    for field in ("llm", "layers", "final_norm", "lm_head"):
        if field in declared:
            yield declared[field]
    for field in ("connector", "vision", "released_connector"):
        yield from declared.get(field, ())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _inside(path: str, outer: str) -> bool:
    """Whether a path is that module or in it."""
    return path == outer or path.startswith(f"{outer}.")


def _common_parent(paths: Iterable[str]) -> str:
    """The longest path that holds all of them."""
    parents = [path.split(".")[:-1] for path in paths]
    shared: list[str] = []
    for names in zip(*parents, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
