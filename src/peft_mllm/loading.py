"""Finding the family of a model and loading it: embedded base, local directory, hub id, or a tiny random member."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from peft_mllm.assets import EMBEDDED
from peft_mllm.errors import ModelError
from peft_mllm.models import MODELS
from peft_mllm.models.base import Family, Loading
from peft_mllm.quantization import config_for, settle
from peft_mllm.spec import ModelSpec

_TINY = re.compile(r"tiny:(?P<family>[\w-]+)(/(?P<member>[\w-]+))?(@(?P<pixels>\d+))?")


def source_of(path: str) -> str:
    """A model's path as transformers takes it."""
    return str(EMBEDDED) if path == "embedded" else path


def load_family(spec: ModelSpec, *, dtype: str, weights: bool = True) -> Family:
    """Load what a spec names.

    Args:
        spec: path and family; `tiny:FAMILY[/MEMBER][@PIXELS]` is a random member, for dry runs.
        dtype: torch's name of the weights' type.
        weights: False leaves a checkpoint's weights where they are: the model is there to look at, not to run.

    Raises:
        ModelError: it is not there, of no known family, or cannot be loaded.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # our own screen says what is going on
    family = _load(spec, dtype, weights=weights)
    # what an adapter's config will call its base: as the user wrote it, not where it lies on this machine
    family.model.name_or_path = spec.path
    return family


def _load(spec: ModelSpec, dtype: str, *, weights: bool = True) -> Family:
    tiny = _TINY.fullmatch(spec.path)
    if tiny:
        kind, pixels = MODELS[tiny["family"]], int(tiny["pixels"] or 56)
        made = kind.tiny_member(tiny["member"], image_size=pixels) if tiny["member"] else kind.tiny(image_size=pixels)
        return _quantised(made, spec, dtype)
    source = source_of(spec.path)
    family = MODELS[spec.family] if spec.family else recognise(source)
    loading = Loading(
        dtype,
        attn_implementation=spec.attn_implementation,
        vision_tower=spec.vision_tower,
        anatomy=spec.anatomy,
        weights=weights,
        quantization=_while_loading(family, source, spec, dtype),
    )
    try:
        return _quantised(family.load(source, loading=loading), spec, dtype)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The model {spec.path} cannot be loaded: {error}") from error


def architecture(spec: ModelSpec) -> tuple[str, str]:
    """Name of the family, in lower case, and the model_type of what a spec names; its weights are not read.

    Raises:
        ModelError: it is not there, or of no known family.
    """
    from transformers import PretrainedConfig

    if _TINY.fullmatch(spec.path):
        family = load_family(spec, dtype="float32")
        return type(family).__name__.lower(), family.model.config.model_type
    source = source_of(spec.path)
    found = MODELS[spec.family] if spec.family else recognise(source)
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"The model {spec.path} cannot be loaded: {error}") from error
    return found.__name__.lower(), str(config.get("model_type"))


def _while_loading(family: type[Family], source: str, spec: ModelSpec, dtype: str) -> Any:
    """The quantisation that transformers does shard by shard, so that the full model is never in memory.

    None where the family's parts are only known of a loaded model, or the layout is not transformers' own.
    """
    from transformers import PretrainedConfig

    anatomy = getattr(family, "anatomy", None)
    if spec.quantization == "none":
        return None
    if anatomy is None or family.original(PretrainedConfig.get_config_dict(source)[0]):
        return None
    return config_for(spec.quantization, dtype=dtype, anatomy=anatomy)


def _quantised(family: Family, spec: ModelSpec, dtype: str) -> Family:
    if spec.quantization != "none":
        settle(family.model, family.anatomy, config_for(spec.quantization, dtype=dtype))
    return family


def dtype_for(wanted: str, device: torch.device) -> str:
    """The weights' type: what is wanted, or with `auto` bfloat16 on a GPU and float32 elsewhere."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.type == "cuda" else "float32"


def recognise(source: str) -> type[Family]:
    """The family of a directory or hub id, by its config.json.

    Raises:
        ModelError: there is no such model, or it is of no family known here.
    """
    from transformers import PretrainedConfig

    if _is_local(source) and not (Path(source) / "config.json").is_file():
        raise ModelError(f"There is no model in {source}: it is no directory with a config.json.")
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"There is no model {source}: it is neither a local directory with a config.json, nor can it be had "
            f"from the hub ({str(error).splitlines()[0]})"
        ) from error
    for name in MODELS:
        if MODELS[name].recognises(config):
            return MODELS[name]
    raise ModelError(
        f"{source} is a '{config.get('model_type')}' model, of no family known here ({', '.join(MODELS)})."
    )


def _is_local(source: str) -> bool:
    """Whether a path is meant, not a hub id: it is there, or at least the directory that it would be in."""
    path = Path(source)
    return source.startswith((".", "/", "~")) or path.exists() or (len(path.parts) > 1 and path.parent.is_dir())
