"""The configuration of Qwen-VL: the published config.json, key by key.

Three architectures call themselves `qwen`. A `visual` dict makes it Qwen-VL; an `audio` dict would be Qwen-Audio;
neither, the text model Qwen-7B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from transformers import PretrainedConfig

from peft_mllm.models.qwen_vl import is_qwen_vl

IMAGE_TOKENS = 256
"""What the resampler makes of an image, and the slots it takes in the text."""
WHEN_MADE: list[Callable[[], None]] = []
"""Called whenever a configuration is made; see auto.py."""
OTHER_QWEN = "only Qwen-VL, whose config.json has a `visual` dict, is known here."


class QwenVLConfig(PretrainedConfig):
    """Sizes and switches of a Qwen-VL model.

    Attributes:
        intermediate_size: twice the inner width of the decoder's MLP, as the published config counts it.
        kv_channels: width of an attention head.
        seq_length: the context of pretraining; beyond it dynamic NTK and logN set in.
        visual: the tower: `heads`, `image_size`, `image_start_id`, `layers`, `mlp_ratio`, `output_dim`,
            `patch_size`, `width`.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"head_dim": "kv_channels"}

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    seq_length: int = 2048
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    rotary_emb_base: float = 10000
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    scale_attn_weights: bool = True
    no_bias: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete and check the sizes.

        Raises:
            ValueError: they do not fit each other.
        """
        self.visual = {
            "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231,
            "output_dim": self.hidden_size, "patch_size": 14, "width": 1664,
        } | self.visual  # fmt: skip
        kwargs.pop("auto_map", None)  # names code files that we neither run nor write
        super().__post_init__(**kwargs)
        if self.visual["output_dim"] != self.hidden_size:
            raise ValueError(f"visual.output_dim is {self.visual['output_dim']}, but hidden_size {self.hidden_size}.")
        if self.rotary_pct != 1.0:
            raise ValueError(f"rotary_pct is {self.rotary_pct}: every published Qwen-VL has 1.0, no other is known.")
        for call in WHEN_MADE:
            call()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config.json.

        Raises:
            ValueError: it is another `qwen`.
        """
        if not is_qwen_vl(config_dict):
            kind = "Qwen-Audio" if "audio" in config_dict else "the text model Qwen"
            raise ValueError(f"This config.json of model_type 'qwen' is that of {kind}: {OTHER_QWEN}")
        return super().from_dict(config_dict, **kwargs)

    @property
    def image_start_id(self) -> int:
        """Token id of `<img>`."""
        return self.visual["image_start_id"]

    @property
    def image_end_id(self) -> int:
        """Token id of `</img>`."""
        return self.image_start_id + 1

    @property
    def image_pad_id(self) -> int:
        """Token id of `<imgpad>`, which fills the slots of an image."""
        return self.image_start_id + 2
