"""Random models in the proportions of a 7B model, on any device, with the processor that every trainer uses.

Weights are random: speed, memory and equality do not depend on what a model has learned. A small shape keeps the
shares that a 7B LLaVA has: the head V h / P is 2 % of the decoder's linears P, tower and connector are 2.6 % of a
step with one question, and LoRA's share is that of rank 128 (7 %); the 7B shapes have
rank 16. Attention's own share is larger in a narrow model (18 % instead of 2 %), on both sides of each comparison.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_mllm.models.base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

BOS_FIRST = "{{- bos_token -}}"
"""TRL tokenises a rendered conversation without special tokens, so its template writes the first one itself."""


@dataclass(frozen=True)
class Tower:
    """A vision tower's width, its MLP's, and how deep it is."""

    hidden: int
    intermediate: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, vocabulary: of the decoder.
        tower: its vision tower.
        image_size: side of an image in pixels; a patch has 14.
        methods: each method's options, scaled with the width.
        qwen: Qwen2.5-VL instead of LLaVA-1.5.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tower: Tower
    image_size: int
    methods: dict[str, dict[str, Any]]
    qwen: bool = False

    @property
    def linear_parameters(self) -> int:
        """P, the parameters of the decoder's linears."""
        attention = 2 * self.hidden**2 + 2 * self.hidden**2 * self.kv_heads // self.heads
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


def _methods(rank: int, bottleneck: int) -> dict[str, dict[str, Any]]:
    """The paper's methods without dropout, which would make two trainers draw differently."""
    return {
        "lora": {"rank": rank, "alpha": 2 * rank, "dropout": 0},
        "ia3": {},
        "adapter": {"bottleneck": bottleneck, "dropout": 0},
        "prefix": {"virtual_tokens": 20},
    }


SHAPES = {
    # 16 image tokens: the code in seconds
    "tiny": Shape(64, 176, 2, 2, 2, 512, Tower(32, 64, 2, 1), 56, _methods(4, 8)),
    "tiny-qwen": Shape(64, 176, 2, 2, 1, 512, Tower(32, 64, 2, 2), 56, _methods(4, 8), qwen=True),
    # 64 image tokens: the equality gate in a minute
    "gate": Shape(128, 344, 2, 2, 2, 512, Tower(64, 128, 2, 1), 112, _methods(4, 8)),
    # 576 image tokens
    "cpu": Shape(512, 1376, 6, 8, 8, 751, Tower(128, 512, 2, 2), 336, _methods(16, 32)),
    "llava-1.5-7b": Shape(4096, 11008, 32, 32, 32, 32064, Tower(1024, 4096, 24, 16), 336, _methods(16, 64)),
    "qwen2.5-vl-7b": Shape(3584, 18944, 28, 28, 4, 152064, Tower(1280, 3420, 32, 16), 448, _methods(16, 64), qwen=True),
}


@dataclass(frozen=True)
class Base:
    """A random model that nobody has touched, and what makes its inputs.

    Attributes:
        shape: its sizes.
        family: as our library sees it.
        processor: as the others see it.
        device: where it is.
        bf16: whether it is held and computed in bfloat16; float32 otherwise.
    """

    shape: Shape
    family: Family
    processor: ProcessorMixin
    device: torch.device
    bf16: bool

    def twin(self) -> Family:
        """Another model on the same weights, to put a method on: a 7B base is in memory once."""
        return self.family.twin()


def make_base(name: str, device: torch.device, *, bf16: bool = False, seed: int = 0) -> Base:
    """A random model of a shape."""
    import torch

    shape = SHAPES[name]
    make = _qwen if shape.qwen else _llava
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return Base(shape, *make(shape, device, dtype), device, bf16)


def _filled(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that configuration, made where it is used: on a GPU 7 billion random numbers take a second."""
    from transformers import AutoModelForImageTextToText

    with device:
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.requires_grad_(False)
    return model.eval()


def _llava(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Family, ProcessorMixin]:
    """LLaVA-1.5: CLIP tower, MLP connector, Llama decoder; the tokenizer is the embedded base's."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    from peft_mllm.models.llava import Llava

    tokenizer, image_processor, template = _embedded(shape.image_size)
    tower = shape.tower
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower.hidden, intermediate_size=tower.intermediate, num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads, image_size=shape.image_size, patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = _filled(config, device, dtype)
    _end(model, tokenizer)
    processor = LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=BOS_FIRST + template,
    )  # fmt: skip
    return Llava(model, tokenizer, image_processor), processor


def _embedded(image_size: int) -> tuple[Any, Any, str]:
    """Tokenizer, image processor for square images of that side, and chat template of the embedded base."""
    from transformers import AutoTokenizer

    from peft_mllm.assets import EMBEDDED
    from peft_mllm.models.llava import load_image_processor

    image_processor = load_image_processor(EMBEDDED)
    image_processor.size = type(image_processor.size)(shortest_edge=image_size)
    image_processor.crop_size = type(image_processor.crop_size)(height=image_size, width=image_size)
    template = (EMBEDDED / "chat_template.jinja").read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(EMBEDDED), image_processor, template


def _qwen(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Family, ProcessorMixin]:
    """Qwen2.5-VL in these sizes, with the tokenizer and the chat of the library's tiny member."""
    from peft_mllm.models.generic.family import Generic

    tiny = Generic.tiny_member("qwen2_5_vl", image_size=shape.image_size)
    config = copy.deepcopy(tiny.model.config)
    text, vision, tower = config.text_config, config.vision_config, shape.tower
    text.vocab_size, text.hidden_size, text.intermediate_size = shape.vocabulary, shape.hidden, shape.intermediate
    text.num_hidden_layers, text.num_attention_heads = shape.layers, shape.heads
    text.num_key_value_heads, text.max_position_embeddings = shape.kv_heads, 8192
    text.head_dim = shape.hidden // shape.heads
    text.layer_types = ["full_attention"] * shape.layers
    half = text.head_dim // 2
    sections = [
        half - 2 * (3 * half // 8),
        3 * half // 8,
        3 * half // 8,
    ]  # time, height, width, as the authors share it
    text.rope_parameters = {**text.rope_parameters, "mrope_section": sections}
    vision.depth, vision.hidden_size, vision.num_heads = tower.layers, tower.hidden, tower.heads
    vision.intermediate_size, vision.out_hidden_size = tower.intermediate, shape.hidden
    vision.fullatt_block_indexes = list(range(7, tower.layers, 8)) or [tower.layers - 1]
    config.tie_word_embeddings = text.tie_word_embeddings = False
    model = _filled(config, device, dtype)
    _end(model, tiny.tokenizer)
    # the line break after the last answer is learned by nobody, and the others learn a conversation to its end
    theirs = copy.copy(tiny.processor)
    role = "if turn['role'] == 'assistant'"
    end, last = '{{ "<|im_end|>\\n" ' + role, '{{ "<|im_end|>" ' + role + " and loop.last else "
    assert end in tiny.processor.chat_template
    theirs.chat_template = tiny.processor.chat_template.replace(end, last + end.removeprefix("{{ "))
    return Generic(model, tiny.processor), theirs


def _end(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let generation end where the tokenizer says, in every trainer."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
