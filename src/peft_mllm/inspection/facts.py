"""The facts of a model: parts, linears by role, images in tokens, its chat, and the cost of each method.

No weights are read: the model is made on the meta device from its config, and each method is attached to a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_mllm.anatomy import Anatomy, Location
from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.errors import DataError, MethodError
from peft_mllm.methods import METHODS
from peft_mllm.record import IMAGE_MARK, ImageSource, Record, Turn
from peft_mllm.spec import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from peft_mllm.models.base import Family
    from peft_mllm.parts import ModelPart

SIZES = ((336, 336), (640, 480), (480, 640), (1024, 768), (1920, 1080))
"""Width and height of the images whose tokens are counted."""
LOCATIONS: tuple[Location, ...] = ("attention", "mlp", "both")
NOT_ON_THEIR_OWN = ("none", "peft")
"""Methods that train nothing, or that need to be told what."""


@dataclass(frozen=True)
class Linears:
    """The decoder's linears of one role.

    Attributes:
        role: such as q, or gate.
        path: inside a layer.
        shapes: inputs and outputs, and how many layers have it so.
    """

    role: str
    path: str
    shapes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Cost:
    """What a method with its usual options would train of the language model.

    Attributes:
        method: name on the shelf.
        location: attention, mlp or both; empty for a method that has no choice.
        parameters: how many; None where the method cannot.
        why: the reason where it cannot.
    """

    method: str
    location: str
    parameters: int | None
    why: str = ""


@dataclass(frozen=True)
class Facts:
    """All that is to be said of a model.

    Attributes:
        path: as it was given.
        family: name on the models shelf.
        architecture: transformers' class.
        parameters: of all of it.
        parts: in order: llm, lm_head, connector, vision, elsewhere.
        layers: path and number of the decoder's layers.
        other_layers: layers without the roles' attention, by class: they look across to the images, or are of
            another kind; of them only linears at a role's path are tuned.
        linears: by role.
        norms: the normalisations that `layernorm` trains, inside a layer.
        attention: backend, heads, heads of keys and values, and width of a head.
        axes: of positions: 1, or 3 for models that count images in time, height and width.
        trees: whether samples of one image may share it.
        image_tokens: by size, as `width x height`.
        stops: the tokens that end an answer.
        chat: stretches of an example as the model reads it, and whether each is learned.
        costs: of each method.
        notes: what a user should know.
    """

    path: str
    family: str
    architecture: str
    parameters: int
    parts: tuple[ModelPart, ...]
    layers: tuple[str, int]
    other_layers: Mapping[str, int]
    linears: tuple[Linears, ...]
    norms: tuple[str, ...]
    attention: Mapping[str, Any]
    axes: int
    trees: bool
    image_tokens: Mapping[str, int]
    stops: tuple[str, ...]
    chat: tuple[tuple[str, bool], ...]
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON data."""
        return asdict(self)


def inspect_model(spec: ModelSpec) -> Facts:
    """Look at a model without its weights.

    Raises:
        ModelError: there is no such model, or its parts are not clear.
    """
    from peft_mllm.attention import TREE_BACKENDS, backend_of
    from peft_mllm.loading import load_family
    from peft_mllm.models import MODELS
    from peft_mllm.parts import parts_of

    family = load_family(spec, dtype="float32", weights=False)
    anatomy, model = family.anatomy, family.model
    anatomy.check(model)
    decoder = model.get_submodule(anatomy.llm)
    sample = _sample(family, (640, 480))
    return Facts(
        path=spec.path,
        family=next(name for name in MODELS if MODELS[name] is type(family)),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        parts=tuple(part for part in parts_of(model, anatomy) if part.modules or part.name != "elsewhere"),
        layers=(anatomy.layers, len(model.get_submodule(anatomy.layers))),
        other_layers=_other_layers(model, anatomy),
        linears=tuple(_linears(model, anatomy)),
        norms=(*anatomy.norms.values(), anatomy.final_norm),
        attention=_attention(decoder.config, backend_of(decoder)),
        axes=len(sample.positions or (0,)),
        trees=family.trees and backend_of(decoder) in TREE_BACKENDS,
        image_tokens={f"{w} x {h}": _image_tokens(family, (w, h)) for w, h in SIZES},
        stops=tuple(family.tokenizer.convert_ids_to_tokens(list(family.stops))),
        chat=tuple(_stretches(family, sample)),
        costs=tuple(_costs(family)),
        notes=family.notes,
    )


# --- layers ---


def _other_layers(model: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    others: Counter[str] = Counter()
    for layer in model.get_submodule(anatomy.layers).children():
        if anatomy.self_attention not in dict(layer.named_modules()):
            others[type(layer).__name__] += 1
    return dict(others)


def _linears(model: nn.Module, anatomy: Anatomy) -> Iterator[Linears]:
    layers = [dict(layer.named_modules()) for layer in model.get_submodule(anatomy.layers).children()]
    for role, path in anatomy.roles("both").items():
        there: list[Any] = [layer[path] for layer in layers if path in layer]
        shapes = Counter((linear.in_features, linear.out_features) for linear in there)
        yield Linears(role, path, tuple((*shape, count) for shape, count in shapes.items()))


def _attention(config: Any, backend: str) -> dict[str, Any]:
    heads = config.num_attention_heads
    return {
        "backend": backend,
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_width": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "window": getattr(config, "sliding_window", None),
    }


# --- what it reads ---


@dataclass(frozen=True)
class _Grey(ImageSource):
    """A grey image of a size."""

    size: tuple[int, int]

    @property
    def key(self) -> str:
        return f"grey {self.size}"

    @property
    def dimensions(self) -> tuple[int, int]:
        return self.size

    def load(self) -> Image:
        from PIL import Image

        return Image.new("RGB", self.size, (128, 128, 128))


def _sample(family: Family, size: tuple[int, int]) -> Sample:
    """An example, of two questions where the model reads so many."""
    asked = (Turn("user", f"{IMAGE_MARK}\nWhat is this?"), Turn("assistant", "A grey square."))
    more = (Turn("user", "What colour is it?"), Turn("assistant", "Grey."))
    images = (_Grey(size),)
    try:
        return family.encode(Record(id="example", turns=asked + more, images=images))
    except DataError:
        return family.encode(Record(id="example", turns=asked, images=images))


def _image_tokens(family: Family, size: tuple[int, int]) -> int:
    """How many tokens an image of a size takes."""
    return len(_of_images(family, _sample(family, size)))


def _of_images(family: Family, sample: Sample) -> list[int]:
    """Where the tokens of a sample's image are, those around it left out.

    An image's tokens are one id over and over; they end at the sample's `image_end`.
    """
    config = family.model.config
    token = next((t for name in ("image_token_id", "image_token_index") if (t := getattr(config, name, None))), None)
    before = sample.ids[: sample.image_end]
    if token not in before:
        token = Counter(before).most_common(1)[0][0]
    return [i for i, each in enumerate(before) if each == token]


def _stretches(family: Family, sample: Sample) -> Iterator[tuple[str, bool]]:
    """The example as text, cut where learning begins and ends; an image's tokens are written as their number."""
    images = set(_of_images(family, sample))
    start = 0
    for i in range(1, len(sample.ids) + 1):
        kinds = [_kind(sample, images, j) for j in (i - 1, i) if j < len(sample.ids)]
        if len(set(kinds)) == 1 and i < len(sample.ids):
            continue
        if kinds[0] == "image":
            yield f"[{i - start} image tokens]", False
        else:
            yield family.tokenizer.decode(list(sample.ids[start:i])), kinds[0] == "learned"
        start = i


def _kind(sample: Sample, images: set[int], i: int) -> str:
    if i in images:
        return "image"
    return "text" if sample.labels[i] == IGNORED else "learned"


# --- methods ---


def _costs(family: Family) -> Iterator[Cost]:
    """What each method would train, at each location that it lets one choose."""
    from peft_mllm.bare import BareModel

    bare = BareModel(family)
    for name in METHODS:
        if name in NOT_ON_THEIR_OWN:
            continue
        located = "location" in METHODS[name].Options.model_fields
        for location in LOCATIONS if located else ("",):
            options = METHODS[name].Options(**({"location": location} if location else {}))
            try:
                yield Cost(name, location, sum(bare.trained(METHODS[name](options)).values()))
            except MethodError as error:
                yield Cost(name, location, None, str(error))
