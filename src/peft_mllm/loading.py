"""Finding the family of a model and loading it: embedded base, local directory, hub id, or a tiny random member."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from peft_mllm.assets import EMBEDDED
from peft_mllm.errors import ModelError
from peft_mllm.models import MODELS
from peft_mllm.models.base import Family, Loading
from peft_mllm.spec import ModelSpec

_TINY = re.compile(r"tiny:(?P<family>[\w-]+)(@(?P<pixels>\d+))?")


def source_of(path: str) -> str:
    """A model's path as transformers takes it."""
    return str(EMBEDDED) if path == "embedded" else path


def load_family(spec: ModelSpec, *, dtype: str) -> Family:
    """Load what a spec names.

    Args:
        spec: path and family; `tiny:FAMILY[@PIXELS]` is a random member, for dry runs.
        dtype: torch's name of the weights' type.

    Raises:
        ModelError: it is not there, of no known family, or cannot be loaded.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # our own screen says what is going on
    family = _load(spec, dtype)
    # what an adapter's config will call its base: as the user wrote it, not where it lies on this machine
    family.model.name_or_path = spec.path
    return family


def _load(spec: ModelSpec, dtype: str) -> Family:
    tiny = _TINY.fullmatch(spec.path)
    if tiny:
        return MODELS[tiny["family"]].tiny(image_size=int(tiny["pixels"] or 56))
    source = source_of(spec.path)
    family = MODELS[spec.family] if spec.family else _recognise(source)
    loading = Loading(dtype, attn_implementation=spec.attn_implementation, vision_tower=spec.vision_tower)
    try:
        return family.load(source, loading=loading)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The model {spec.path} cannot be loaded: {error}") from error


def dtype_for(wanted: str, device: torch.device) -> str:
    """The weights' type: what is wanted, or with `auto` bfloat16 on a GPU and float32 elsewhere."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.type == "cuda" else "float32"


def _recognise(source: str) -> type[Family]:
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
