"""Today's architectures in small, each with its own configuration, processor, special tokens and form of chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_mllm.models.generic.member import (
    NORMALISED,
    PATCH,
    ROPE,
    Chat,
    Member,
    Parts,
    chatml,
    ids_of,
    text_config,
    tower_config,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# --- Qwen and GLM: images in their own size, positions on three axes, the connector inside the tower ---

_QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
         "vision_eos_token": "<|vision_end|>"}  # fmt: skip
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_CHATML = ("<|im_start|>", "<|im_end|>")


def _qwen(version: str, vision: Mapping[str, Any], **text: Any) -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import AutoConfig

        seeing = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, **vision}
        ids = ids_of(
            tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
        )  # fmt: skip
        return AutoConfig.for_model(
            version, text_config=text_config(tokenizer, **ROPE, **text), vision_config=seeing, **ids
        )

    names = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}

    def processor(size: int) -> Parts:
        return names[version], "Qwen2VLImageProcessorPil", {}, _pixels_between(size)

    return Member(config, processor, chatml(_QWEN_IMAGE), "<|im_end|>", _QWEN, more=_CHATML)


def _pixels_between(size: int) -> dict[str, Any]:
    """Settings of an image processor that keeps an image's form: at most four times the square's area."""
    area = {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": 4 * size * size}
    return {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": area, **NORMALISED}


def _glm4v() -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import Glm4vConfig

        seeing = {
            "depth": 2, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "image_size": size, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        ids = ids_of(
            tokenizer, image_token_id="<|image|>", video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>", image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>", video_end_token_id="<|end_of_video|>",
        )  # fmt: skip
        rope = {"rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
        return Glm4vConfig(text_config=text_config(tokenizer, **rope), vision_config=seeing, **ids)

    def processor(size: int) -> Parts:
        return "Glm4vProcessor", "Glm4vImageProcessorPil", {}, _pixels_between(size)

    image = "<|begin_of_image|><|image|><|end_of_image|>"
    chat = Chat(("<|user|>\n", ""), ("<|assistant|>\n", ""), "<|assistant|>\n", image, start="[gMASK]<sop>")
    tokens = {"image_token": "<|image|>", "video_token": "<|video|>"}
    more = (
        "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>",
        "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    )  # fmt: skip
    return Member(config, processor, chat, "<|endoftext|>", tokens, more, stops=("<|endoftext|>", "<|user|>"))


# --- a tower, a projector, a decoder ---


def _llava(name: str, tower: str, text: str, image_processor: str, chat: Chat, **more: Any) -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import AutoConfig

        return AutoConfig.for_model(
            name,
            vision_config={"model_type": tower, **tower_config(size)},
            text_config={"model_type": text, **text_config(tokenizer)},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=_pinpoints(size),
            **({"video_token_index": tokenizer.convert_tokens_to_ids("<video>")} if name == "llava_onevision" else {}),
            **more,
        )

    def processor(size: int) -> Parts:
        patches = (size // PATCH) ** 2
        crop = {} if name == "llava_onevision" else {"crop_size": {"height": size, "width": size}}
        edge = {"height": size, "width": size} if name == "llava_onevision" else {"shortest_edge": size}
        images = {"size": edge, **crop, "image_grid_pinpoints": _pinpoints(size), **NORMALISED}
        if name == "llava_onevision":
            return "LlavaOnevisionProcessor", image_processor, {
                "num_image_tokens": patches, "vision_feature_select_strategy": "full",
            }, images  # fmt: skip
        return "LlavaNextProcessor", image_processor, {
            "patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        }, images  # fmt: skip

    tokens = {"image_token": "<image>", **({"video_token": "<video>"} if name == "llava_onevision" else {})}
    end = "<|im_end|>" if name == "llava_onevision" else "</s>"
    return Member(
        config, processor, chat, end, tokens,
        more=_CHATML if name == "llava_onevision" else (), first=name == "llava_next",
    )  # fmt: skip


def _pinpoints(size: int) -> list[list[int]]:
    return [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]


_VICUNA = Chat(("USER: ", " "), ("ASSISTANT: ", " "), "ASSISTANT:", "<image>\n")
"""As the LLaVA-NeXT checkpoints have it: an answer ends without a token."""


def _internvl() -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import InternVLConfig

        tower = tower_config(size, image_size=[size, size], patch_size=[PATCH, PATCH])
        return InternVLConfig(
            vision_config=tower, text_config={"model_type": "qwen2", **text_config(tokenizer)}, downsample_ratio=0.5,
            tie_word_embeddings=False,
            image_seq_length=(size // PATCH) ** 2 // 4, **ids_of(tokenizer, image_token_id="<IMG_CONTEXT>"),
        )  # fmt: skip

    def processor(size: int) -> Parts:
        images = {"size": {"height": size, "width": size}, "min_patches": 1, "max_patches": 3, **NORMALISED}
        length = {"image_seq_length": (size // PATCH) ** 2 // 4}
        return "InternVLProcessor", "GotOcr2ImageProcessorPil", length, images

    tokens = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    return Member(config, processor, chatml("<IMG_CONTEXT>\n"), "<|im_end|>", tokens, more=_CHATML)


def _idefics(name: str, classes: str) -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import AutoConfig

        return AutoConfig.for_model(
            name, vision_config=tower_config(size), scale_factor=2,
            text_config={"model_type": "llama", **text_config(tokenizer)},
            pad_token_id=tokenizer.pad_token_id, **ids_of(tokenizer, image_token_id="<image>"),
        )  # fmt: skip

    def processor(size: int) -> Parts:
        images = {
            "size": {"longest_edge": 2 * size}, "max_image_size": {"longest_edge": size}, "do_image_splitting": True,
            **NORMALISED,
        }  # fmt: skip
        return (
            f"{classes}Processor",
            f"{classes}ImageProcessorPil",
            {"image_seq_len": (size // PATCH) ** 2 // 4},
            images,
        )

    end = "<end_of_utterance>"
    chat = Chat(("User: ", f"{end}\n"), ("Assistant: ", f"{end}\n"), "Assistant:", "<image>", start="<|im_start|>")
    tokens = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
              "global_image_token": "<global-img>", "end_of_utterance_token": end}  # fmt: skip
    cells = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    return Member(config, processor, chat, end, tokens, more=("<|im_start|>", *cells))


# --- Gemma: images, or all of a prompt, look ahead ---


def _paligemma() -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import PaliGemmaConfig

        return PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", **tower_config(size), "projection_dim": 32},
            text_config={"model_type": "gemma", **text_config(tokenizer, head_dim=8)},
            projection_dim=32, hidden_size=32,
            vocab_size=len(tokenizer), image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )  # fmt: skip

    def processor(size: int) -> Parts:
        images = {"size": {"height": size, "width": size}, "image_seq_length": (size // PATCH) ** 2, **NORMALISED}
        return "PaliGemmaProcessor", "SiglipImageProcessorPil", {}, images

    return Member(config, processor, None, "</s>", {"image_token": "<image>"})


def _gemma3() -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import Gemma3Config

        attention = {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention"],
        }  # fmt: skip
        return Gemma3Config(
            vision_config={"model_type": "siglip_vision_model", **tower_config(size)}, mm_tokens_per_image=4,
            text_config=text_config(tokenizer, **attention),
            **ids_of(
                tokenizer, image_token_index="<image_soft_token>", boi_token_index="<start_of_image>",
                eoi_token_index="<end_of_image>",
            ),
        )  # fmt: skip

    def processor(size: int) -> Parts:
        images = {"size": {"height": size, "width": size}, **NORMALISED}
        return "Gemma3Processor", "Gemma3ImageProcessorPil", {"image_seq_length": 4}, images

    end = "<end_of_turn>"
    chat = Chat(
        ("<start_of_turn>user\n", f"{end}\n"), ("<start_of_turn>model\n", f"{end}\n"), "<start_of_turn>model\n",
        "<start_of_image>", start="<s>",
    )  # fmt: skip
    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return Member(config, processor, chat, end, tokens, more=("<start_of_turn>",), first=True)


# --- Mllama: text looks across to the images in layers of their own ---


def _mllama() -> Member:
    def config(tokenizer: PreTrainedTokenizerBase, size: int) -> PretrainedConfig:
        from transformers import MllamaConfig

        seeing = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": size, "patch_size": PATCH, "max_num_tiles": 2,
            "intermediate_layers_indices": [0], "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        }  # fmt: skip
        text = text_config(tokenizer, num_hidden_layers=3, cross_attention_layers=[1])
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        return MllamaConfig(
            vision_config=seeing, text_config={**text, **rope}, **ids_of(tokenizer, image_token_index="<|image|>")
        )

    def processor(size: int) -> Parts:
        images = {"size": {"height": size, "width": size}, "max_image_tiles": 2, **NORMALISED}
        return "MllamaProcessor", "MllamaImageProcessorPil", {}, images

    def turn(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    end = "<|eot_id|>"
    chat = Chat((turn("user"), end), (turn("assistant"), end), turn("assistant"), "<|image|>", start="<s>")
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    return Member(config, processor, chat, end, {"image_token": "<|image|>"}, more=headers, first=True)


MEMBERS: dict[str, Member] = {
    "qwen2_vl": _qwen("qwen2_vl", {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen("qwen2_5_vl", {
        "depth": 2, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
    }),
    "qwen3_vl": _qwen("qwen3_vl", {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }, head_dim=8),
    "llava_next": _llava("llava_next", "clip_vision_model", "llama", "LlavaNextImageProcessorPil", _VICUNA),
    "llava_onevision": _llava(
        "llava_onevision", "siglip_vision_model", "qwen2", "LlavaOnevisionImageProcessorPil", chatml("<image>\n"),
        vision_feature_select_strategy="full",
    ),
    "internvl": _internvl(),
    "idefics3": _idefics("idefics3", "Idefics3"),
    "smolvlm": _idefics("smolvlm", "SmolVLM"),
    "paligemma": _paligemma(),
    "gemma3": _gemma3(),
    "mllama": _mllama(),
    "glm4v": _glm4v(),
}  # fmt: skip
"""The members by transformers' name of the architecture."""
