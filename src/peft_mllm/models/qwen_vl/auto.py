"""Qwen-VL in transformers' Auto classes: after `import peft_mllm`, they load a published directory by our classes.

Each is registered when transformers loads the part it belongs to, so that importing us loads nothing. The models
are registered when the first configuration is made: only then is every module they need sure to be complete.
"""

from __future__ import annotations

import sys
from types import ModuleType

from peft_mllm.models.qwen_vl.configuration import WHEN_MADE, QwenVLConfig

MODELS_OF_TRANSFORMERS = "transformers.models.auto.modeling_auto"


def register(auto: ModuleType) -> None:
    """Tell one of transformers' `models.auto` modules what it needs to know."""
    part = auto.__name__.rpartition(".")[2]
    if part == "configuration_auto":
        auto.AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
        WHEN_MADE.append(register_models)
    elif part == "tokenization_auto":
        from peft_mllm.models.qwen_vl.tokenizer import QWenTokenizer

        auto.AutoTokenizer.register(QwenVLConfig, fast_tokenizer_class=QWenTokenizer, exist_ok=True)
    elif part == "image_processing_auto":
        from peft_mllm.models.qwen_vl.images import QwenVLImageProcessor

        auto.AutoImageProcessor.register(
            QwenVLConfig, image_processor_classes={"pil": QwenVLImageProcessor}, exist_ok=True
        )
    elif part == "processing_auto":
        from peft_mllm.models.qwen_vl.processor import QwenVLProcessor

        auto.AutoProcessor.register(QwenVLConfig, QwenVLProcessor, exist_ok=True)


def register_models() -> None:
    """Register the model classes, if somebody uses transformers' Auto classes for models."""
    auto = sys.modules.get(MODELS_OF_TRANSFORMERS)
    if auto is None or QwenVLConfig in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return
    from peft_mllm.models.qwen_vl.modelling import QwenVLForConditionalGeneration, QwenVLModel

    auto.AutoModel.register(QwenVLConfig, QwenVLModel, exist_ok=True)
    for heads in (auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText):
        heads.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
