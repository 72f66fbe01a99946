"""Qwen-VL and Qwen-VL-Chat (Bai et al. 2023, arXiv 2308.12966), written for transformers, which has no such model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_qwen_vl(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is Qwen-VL's; text Qwen and Qwen-Audio have the same model_type."""
    return config.get("model_type") == "qwen" and isinstance(config.get("visual"), Mapping) and "audio" not in config
