"""Qwen-VL and Qwen-VL-Chat (Bai et al. 2023, arXiv 2308.12966): ViT, resampler, Qwen-7B; ChatML conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.anatomy import Anatomy
from peft_mllm.data.encode import Sample
from peft_mllm.errors import ModelError
from peft_mllm.models.base import Family, Labels, Loading
from peft_mllm.models.qwen_vl import is_qwen_vl
from peft_mllm.record import Record
from peft_mllm.weights import local_directory

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from peft_mllm.models.qwen_vl.modelling import QwenVLForConditionalGeneration
    from peft_mllm.models.qwen_vl.processor import QwenVLProcessor


class QwenVL(Family):
    """A Qwen-VL model with its processor.

    The connector is the resampler with the norm and the projection behind it. What the study's released code calls
    so, the token embeddings and the head, is its released connector.
    """

    anatomy = Anatomy(
        llm="transformer",
        layers="transformer.h",
        self_attention="attn",
        attention={"qkv": "attn.c_attn", "o": "attn.c_proj"},
        mlp={"gate": "mlp.w2", "up": "mlp.w1", "down": "mlp.c_proj"},
        norms={"attention": "ln_1", "mlp": "ln_2"},
        final_norm="transformer.ln_f",
        connector=("transformer.visual.attn_pool", "transformer.visual.ln_post", "transformer.visual.proj"),
        vision=(
            "transformer.visual.conv1",
            "transformer.visual.positional_embedding",
            "transformer.visual.ln_pre",
            "transformer.visual.transformer",
        ),
        lm_head="lm_head",
        released_connector=("transformer.wte", "lm_head"),
    )

    def __init__(self, model: QwenVLForConditionalGeneration, processor: QwenVLProcessor):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.patches = (model.config.visual["image_size"] // model.config.visual["patch_size"]) ** 2
        self.reach = model.config.seq_length if model.config.use_dynamic_ntk else None
        model.generation_config.eos_token_id = list(self.stops)
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """A `qwen` with a `visual` dict; text Qwen and Qwen-Audio have the same model_type and none."""
        return is_qwen_vl(config)

    @classmethod
    def original(cls, config: Mapping[str, Any]) -> bool:
        """The published layout names the class of its own code; `save` writes ours."""
        return "QwenVLForConditionalGeneration" not in (config.get("architectures") or ())

    @classmethod
    def load(cls, source: str | Path, *, loading: Loading) -> QwenVL:
        """A published directory or hub id (Qwen/Qwen-VL-Chat), .bin or safetensors, or one that `save` wrote.

        Raises:
            ModelError: tensors are missing or left over, or tokenizer and weights do not belong together.
        """
        from peft_mllm.models.qwen_vl.checkpoint import load_model
        from peft_mllm.models.qwen_vl.processor import QwenVLProcessor

        if loading.vision_tower is not None:
            raise ModelError(f"{source}: Qwen-VL has its vision tower inside; leave vision_tower out.")
        directory = local_directory(source)
        if not any((directory / name).is_file() for name in ("qwen.tiktoken", "tokenizer.json")):
            raise ModelError(f"{source} has no tokenizer: put the published qwen.tiktoken beside its config.json.")
        processor = QwenVLProcessor.from_pretrained(directory)
        model = load_model(directory, loading)
        _check_tokenizer(source, processor, model)
        return cls(model, processor)

    @classmethod
    def tiny(cls, *, image_size: int = 56, seed: int = 0) -> QwenVL:
        """Two decoder layers of width 128 and two of the tower; a token for each byte."""
        import torch

        from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
        from peft_mllm.models.qwen_vl.images import QwenVLImageProcessor
        from peft_mllm.models.qwen_vl.modelling import QwenVLForConditionalGeneration
        from peft_mllm.models.qwen_vl.processor import QwenVLProcessor
        from peft_mllm.models.qwen_vl.tokenizer import QWenTokenizer

        tokenizer = QWenTokenizer.of_ranks({bytes([byte]): byte for byte in range(256)})
        config = QwenVLConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, kv_channels=32,
            intermediate_size=256,
            visual={
                "heads": 2, "image_size": image_size, "image_start_id": tokenizer.image_start_id, "layers": 2,
                "mlp_ratio": 2.0, "patch_size": 14, "width": 32,
            },
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = QwenVLForConditionalGeneration(config)
        images = QwenVLImageProcessor(size={"height": image_size, "width": image_size})
        return cls(model.eval(), QwenVLProcessor(images, tokenizer))

    def encode(self, record: Record, *, answer: bool = True, labels: Labels = "answer") -> Sample:
        """ChatML; answers and their `<|im_end|>` are learned, with `upstream` also the frames of all turns."""
        from peft_mllm.models.qwen_vl.chatml import encode

        return encode(record, self.tokenizer, answer=answer, labels=labels)

    def pixels(self, images: Sequence[Sequence[Image]], input_ids: Tensor) -> dict[str, Tensor]:
        """`pixel_values` (N, 3, S, S), each image stretched to the tower's square."""
        flat = [image for row in images for image in row]
        return {"pixel_values": self.processor.image_processor(images=flat, return_tensors="pt")["pixel_values"]}

    @property
    def image_settings(self) -> Mapping[str, Any]:
        """The square's side and the normalisation."""
        settings: Mapping[str, Any] = self.processor.image_processor.to_dict()
        return settings

    @property
    def stops(self) -> tuple[int, ...]:
        """`<|im_end|>`, `<|im_start|>` and `<|endoftext|>`: the first ends a chat model's, the last a base's."""
        return (self.tokenizer.im_end_id, self.tokenizer.im_start_id, self.tokenizer.eos_token_id)

    def save(self, directory: Path) -> None:
        """A directory with the published tensor names; transformers loads it after `import peft_mllm`."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)


def _check_tokenizer(source: str | Path, processor: QwenVLProcessor, model: QwenVLForConditionalGeneration) -> None:
    tokenizer, config = processor.tokenizer, model.config
    if tokenizer.image_start_id != config.image_start_id or len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{source}: tokenizer and weights do not belong together: <img> is token {tokenizer.image_start_id} of "
            f"{len(tokenizer)}, but config.json says {config.image_start_id} of {config.vocab_size}."
        )
