"""The vision tower of an original LLaVA: inside the checkpoint, where its config points, or as the user says.

LLaVA-1.5 (arXiv 2310.03744) is trained on a frozen CLIP and comes without it. ShareGPT4V (arXiv 2311.12793) tunes
the upper half of its CLIP and publishes the tower beside the checkpoint. A plain CLIP of the same geometry fits
there, too, and the answers merely get worse; what can be told from names and files is told as a `DegradedModel`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import DegradedModel, ModelError
from peft_mllm.files import read_json
from peft_mllm.weights import local_directory, weight_names

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

REMEDY = "Give it with --vision-tower DIR_OR_ID, or as `vision_tower` of a spec's `model`."

# A tower's weight: after whatever prefix its file or the checkpoint around it has, and with CLIP's own inner level
# `vision_model`, which files written by transformers 5 do not have.
_WEIGHT = re.compile(
    r"(?:model\.)?(?:vision_tower\.){0,2}(?:vision_model\.)?"
    r"(?P<inside>(?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)"
)
# What else a full CLIP checkpoint has: its text half, and what joins the two.
_TEXT_HALF = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale$")
_PLAIN_CLIP = re.compile(r"clip-vit", re.IGNORECASE)  # how OpenAI and LAION name theirs

# CLIP-L/14 at 336 pixels, for a checkpoint that has such a tower inside and whose config file is not at hand.
_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_OF_LARGE_336 = ("clip-vit-large-patch14-336", "ShareGPT4V-7B_Pretrained_vit-large336-l12")


@dataclass(frozen=True)
class Tower:
    """A tower that was found.

    Attributes:
        name: as the user, or the checkpoint's config, calls it.
        directory: where its weights are; None when they are inside the checkpoint.
        config: its geometry.
        preprocessor: what its preprocessor_config.json says; empty where it has none.
        doubt: why it may not be the tower that the checkpoint was trained with; empty where nothing says so.
    """

    name: str
    directory: Path | None
    config: CLIPVisionConfig
    preprocessor: Mapping[str, Any]
    doubt: str = ""

    @property
    def note(self) -> str:
        """Where it comes from, in words."""
        return f"Vision tower: {self.name}" if self.directory else "Vision tower: the one inside the checkpoint"


def find_tower(source: str, config: Mapping[str, Any], *, given: str | None, inside: bool) -> Tower:
    """The tower of a checkpoint.

    Args:
        source: the checkpoint, for messages.
        config: its config.json.
        given: the user's choice, which goes before everything else.
        inside: whether the checkpoint has a tower's weights of its own; they go before the config's choice.

    Raises:
        ModelError: it cannot be had, or is no CLIP.

    Warns:
        DegradedModel: a tuned tower is wanted, and this one is a plain CLIP, or cannot be told from one.
    """
    named = str(config.get("mm_vision_tower") or "")
    name = given or named
    if not name:
        raise ModelError(f"{source}: its config.json names no vision tower (mm_vision_tower). {REMEDY}")
    try:
        directory = local_directory(name)
    except ModelError as error:
        if given:
            raise ModelError(f"The vision tower cannot be had: {error}") from error
        if not inside or Path(name).name not in _OF_LARGE_336:
            which = "is inside, but described by" if inside else "is"
            raise ModelError(
                f"{source}: its vision tower {which} {name} (mm_vision_tower in its config.json). {error} {REMEDY}"
            ) from error
        return Tower(name, None, _vision_config({"model_type": "clip_vision_model", **_LARGE_336}, name), {})
    described = _json_of(directory / "config.json", required=True)
    from_outside = bool(given) or not inside
    doubt = _doubt(source, config, name, described, weight_names(directory)) if from_outside else ""
    if doubt:
        warnings.warn(doubt, DegradedModel, stacklevel=2)
    return Tower(
        name=name,
        directory=directory if from_outside else None,
        config=_vision_config(described, name),
        preprocessor=_json_of(directory / "preprocessor_config.json"),
        doubt=doubt,
    )


def tower_weight(name: str) -> str | None:
    """The name inside CLIP's vision model of a weight of a tower's file or of a checkpoint; None of any other."""
    found = _WEIGHT.fullmatch(name)
    return found["inside"] if found else None


def is_unused(name: str) -> bool:
    """Whether a tensor of a tower's file has no use here: the text half, and positions, which are 0, 1, 2 ..."""
    return bool(_TEXT_HALF.match(name)) or name.endswith("embeddings.position_ids")


def _doubt(
    source: str, config: Mapping[str, Any], name: str, described: Mapping[str, Any], weights: Iterable[str]
) -> str:
    """What can be shown is said, and what cannot, too: two towers of one geometry differ in nothing but numbers."""
    wanted = str(config.get("mm_vision_tower") or "")
    if not _has_its_own(config):
        return ""
    names = [Path(each).name for each in (name, str(described.get("_name_or_path") or ""))]
    plain = next((each for each in names if _PLAIN_CLIP.match(each)), None)
    if plain:
        shown = f"{name} is a plain CLIP (it is called {plain})"
    elif described.get("model_type") == "clip" or any(map(_TEXT_HALF.match, weights)):
        shown = f"{name} is a plain CLIP (it comes with CLIP's text half)"
    elif Path(wanted).name not in names:
        shown = f"nothing shows that {name} is that tower and not a plain CLIP"
    else:
        return ""
    return (
        f"{source} was trained with a tuned vision tower, {wanted or 'of its own'}, but {shown}. With a plain CLIP "
        f"in its place the answers get worse, and nothing else would show it. {REMEDY}"
    )


def _has_its_own(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained with a tuned tower: by its kind, its flags, or the tower that it names."""
    kinds = [str(config.get("model_type")), *map(str, config.get("architectures") or ())]
    tuned = any(config.get(flag) for flag in ("unfreeze_mm_vision_tower", "tune_vision_tower"))
    called = Path(str(config.get("mm_vision_tower") or "clip-vit")).name
    return tuned or any(kind.lower().startswith("share4v") for kind in kinds) or not _PLAIN_CLIP.match(called)


def _vision_config(described: Mapping[str, Any], name: str) -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig

    kind = described.get("model_type")
    if kind == "clip":
        described = described.get("vision_config_dict") or described["vision_config"]
    elif kind != "clip_vision_model":
        raise ModelError(f"The vision tower {name} is a '{kind}' model; LLaVA-1.5 and ShareGPT4V have a CLIP.")
    kept = {key: value for key, value in described.items() if key in CLIPVisionConfig().to_dict()}
    return CLIPVisionConfig(**{key: value for key, value in kept.items() if key not in _NOT_GEOMETRY})


# Of a config file written by an older version: not about the model, or replaced by what is decided here.
_NOT_GEOMETRY = {"_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}


def _json_of(file: Path, *, required: bool = False) -> dict[str, Any]:
    if not file.is_file() and not required:
        return {}
    try:
        return dict(read_json(file))
    except (OSError, ValueError) as error:
        raise ModelError(f"The vision tower's {file} cannot be read: {error}") from error
