"""LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744) and ShareGPT4V: CLIP tower, MLP connector, Llama decoder.

In Hugging Face's format or the original one. The conversation is vicuna v1 with the original's label rule: only an
answer and its `</s>` are learned. Images are padded to a square with the tower's mean colour, as LLaVA-1.5 was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.anatomy import Anatomy
from peft_mllm.data.encode import ImagePlace, Sample, Text, encode_pieces
from peft_mllm.errors import ModelError
from peft_mllm.files import read_json, write_json
from peft_mllm.models.base import Family, Labels, Loading, check_marks
from peft_mllm.models.hf_format import load_hf
from peft_mllm.models.original_llava import is_original, load_original
from peft_mllm.record import IMAGE_MARK, Record

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Llava(Family):
    """A LLaVA-1.5 model with its tokenizer and image processor."""

    anatomy = Anatomy(
        llm="model.language_model",
        layers="model.language_model.layers",
        self_attention="self_attn",
        attention={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
        },
        mlp={"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
        norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
        final_norm="model.language_model.norm",
        connector=("model.multi_modal_projector",),
        vision=("model.vision_tower",),
        lm_head="lm_head",
    )

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, image_processor: Any):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._image_tokens = image_tokens(model.config)
        self.patches = _side(model.config) ** 2 + 1  # CLIP computes its class token whether it is kept or not

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """HF's own layout, or the original repository's, which has the same model_type but flat keys."""
        return (config.get("model_type") == "llava" and "vision_config" in config) or is_original(config)

    @classmethod
    def original(cls, config: Mapping[str, Any]) -> bool:
        """The layout of the LLaVA and ShareGPT4V repositories."""
        return is_original(config)

    @classmethod
    def load(cls, source: str | Path, *, loading: Loading) -> Llava:
        """Load a directory or hub id such as llava-hf/llava-1.5-7b-hf or liuhaotian/llava-v1.5-7b."""
        from transformers import AutoTokenizer, PretrainedConfig

        config, _ = PretrainedConfig.get_config_dict(source)
        if is_original(config):
            *parts, notes = load_original(source, loading=loading)
            family = cls(*parts)
            family.notes = notes
            return family
        model = load_hf(source, loading=loading)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if not tokenizer.is_fast:
            raise ModelError(f"{source}: its tokenizer gives no character offsets; add a tokenizer.json.")
        return cls(model, tokenizer, load_image_processor(source))

    @classmethod
    def tiny(cls, *, image_size: int = 56, seed: int = 0) -> Llava:
        """Two decoder layers of width 32 with the embedded base's tokenizer; 4 heads share 2 keys and values."""
        import torch
        from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig
        from transformers import LlavaForConditionalGeneration as Model

        from peft_mllm.assets import EMBEDDED

        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                image_size=image_size, patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
                pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Model(config)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        processor = load_image_processor(EMBEDDED)
        processor.size = type(processor.size)(shortest_edge=image_size)
        processor.crop_size = type(processor.crop_size)(height=image_size, width=image_size)
        return cls(model.eval(), tokenizer, processor)

    def encode(self, record: Record, *, answer: bool = True, labels: Labels = "answer") -> Sample:
        """Vicuna v1: system text, `USER: ...`, `ASSISTANT: ...</s>`; answers and their `</s>` are learned.

        That is also what LLaVA's authors supervised.
        """
        check_marks(record)
        return encode_pieces(
            list(self._pieces(record, answer=answer)),
            self.tokenizer,
            image_token_id=self.model.config.image_token_id,
            id=record.id,
            images=record.images,
        )

    def _pieces(self, record: Record, *, answer: bool) -> Iterator[Text | ImagePlace]:
        system = next((turn.text for turn in record.turns if turn.role == "system"), SYSTEM)
        yield Text(f"{system} ")
        turns = [turn for turn in record.turns if turn.role != "system"]
        for i, turn in enumerate(turns):
            if turn.role == "user":
                yield Text("USER: ")
                yield from self._user(turn.text)
                yield Text(" ASSISTANT:")
            elif answer or i < len(turns) - 1:
                yield Text(f" {turn.text}{self.tokenizer.eos_token}", supervised=True)

    def _user(self, text: str) -> Iterator[Text | ImagePlace]:
        """A user's text; a single image goes to its front with a line break, as in the original's training."""
        if text.count(IMAGE_MARK) == 1:
            text = f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()
        for i, stretch in enumerate(text.split(IMAGE_MARK)):
            if i > 0:
                yield ImagePlace(self._image_tokens)
            if stretch:
                yield Text(stretch)

    def pixels(self, images: Sequence[Sequence[Image]], input_ids: Tensor) -> dict[str, Tensor]:
        """`pixel_values` (N, 3, H, W): each image padded to a square, resized and normalised.

        Not padded where the image processor says so in so many words; CLIP's says nothing of it.
        """
        background = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
        given = [image for row in images for image in row]
        if getattr(self.image_processor, "do_pad", None) is not False:
            given = [pad_to_square(image, background) for image in given]
        pixel_values = self.image_processor(images=given, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values}

    @property
    def image_settings(self) -> Mapping[str, Any]:
        """Those of CLIP's processor."""
        settings: Mapping[str, Any] = self.image_processor.to_dict()
        return settings

    def save(self, directory: Path) -> None:
        """An HF directory with model, tokenizer, processor and chat template, which plain transformers loads."""
        from transformers import LlavaProcessor

        from peft_mllm.assets import EMBEDDED

        self.model.save_pretrained(directory)
        _write_dtype(directory / "config.json", str(self.model.lm_head.weight.dtype).removeprefix("torch."))
        LlavaProcessor(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            patch_size=self.model.config.vision_config.patch_size,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            image_token=IMAGE_MARK,
            num_additional_image_tokens=1,  # CLIP's class token, which `default` then takes off again
            chat_template=(EMBEDDED / "chat_template.jinja").read_text(encoding="utf-8"),
        ).save_pretrained(directory)


def _write_dtype(config: Path, dtype: str) -> None:
    """Say the language model's type, in which all is to be run; transformers says that of the tower, which is first.

    The two differ where the tensors of an original checkpoint are written as they were stored.
    """
    said = read_json(config)
    for part in (said, said["text_config"], said["vision_config"]):
        part["dtype"] = dtype
    write_json(config, said)


def load_image_processor(source: str | Path) -> Any:
    """The directory's image processor, always by PIL: torchvision resizes to slightly other pixels.

    By its class, not by transformers' Auto class, which in some versions asks for torchvision in any case.
    """
    import transformers

    settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
    name = str(settings.get("image_processor_type", "CLIPImageProcessor")).removesuffix("Fast").removesuffix("Pil")
    by_pil = getattr(transformers, f"{name}Pil", None)
    if by_pil is None:
        raise ModelError(f"{source}: transformers has no {name} that works by PIL.")
    return by_pil.from_pretrained(source)


def image_tokens(config: LlavaConfig) -> int:
    """Placeholders of one image: its patches, and the class token where the config keeps it."""
    return _side(config) ** 2 + (config.vision_feature_select_strategy != "default")


def _side(config: LlavaConfig) -> int:
    """Patches along one side of an image."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def pad_to_square(image: Image, background: tuple[int, ...]) -> Image:
    """The image in the middle of a square as wide as its longer side."""
    from PIL import Image as Images

    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Images.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
