"""Qwen-VL as a transformers model: the tower's 256 features in the slots of each image, then the Qwen-7B decoder.

The module names are those of the published checkpoint. Two of its tensors are bare parameters that we hold in modules
(see vision.py); transformers' weight renaming maps them when reading and back when writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from peft_mllm.models.qwen_vl.configuration import IMAGE_TOKENS, QwenVLConfig
from peft_mllm.models.qwen_vl.decoder import Places, QwenVLAttention, QwenVLBlock, QwenVLMLP, QwenVLRMSNorm
from peft_mllm.models.qwen_vl.rotary import logn, ntk_level, rotary
from peft_mllm.models.qwen_vl.vision import (
    Positions,
    Projection,
    Resampler,
    ResamplerAttention,
    VisionTower,
    sincos_table,
)

_BARE = ("proj", "positional_embedding")
BARE_PARAMETERS = {f"transformer.visual.{name}": f"transformer.visual.{name}.weight" for name in _BARE}
"""Names in the published checkpoint -> ours, where they differ."""

# The lookahead keeps a name that has its `.weight` already, such as an adapter's, as it is.
register_checkpoint_conversion_mapping(
    "qwen",
    [WeightRenaming(rf"visual\.{name}(?!\w|\.weight)", rf"visual\.{name}\.weight") for name in _BARE],
    overwrite=True,
)


@dataclass
class QwenVLOutput(BaseModelOutputWithPast):
    """What the decoder gives.

    Attributes:
        image_hidden_states: (N, 256, D), the features of the images.
    """

    image_hidden_states: Tensor | None = None


@dataclass
class QwenVLCausalLMOutput(CausalLMOutputWithPast):
    """What the model with its head gives; see `QwenVLOutput`."""

    image_hidden_states: Tensor | None = None


class QwenVLPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the architecture."""

    config: QwenVLConfig
    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenVLBlock", "VisionBlock", "Resampler"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QwenVLBlock, "attentions": QwenVLAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range), and what the paper of GPT-2 says of a residual's last linear."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Positions | Projection):
            init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
        elif isinstance(module, Resampler):
            init.normal_(module.query, std=std)
            init.copy_(module.pos_embed, sincos_table(module.pos_embed.shape[1]))
        elif isinstance(module, ResamplerAttention):
            init.normal_(module.in_proj_weight, std=std)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, QwenVLAttention | QwenVLMLP):
            init.normal_(module.c_proj.weight, std=std / (2 * self.config.num_hidden_layers) ** 0.5)


class QwenVLModel(QwenVLPreTrainedModel):
    """Tower and decoder, without the head.

    Positions follow `position_ids` where they are given (shared prefixes, learned prefixes, generation); without
    them they count every token, padding too, as in the original. Likewise the length that dynamic NTK goes by: the
    row's last position, or the tokens of the row. A prompt's NTK step is kept with its cache, so that the tokens after
    it are turned as it was.
    """

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QwenVLBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTower(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.wte = value

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) -> features (N, 256, D)."""
        return self.visual(pixel_values)

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> QwenVLOutput:
        """Hidden states (R, T, D).

        Args:
            input_ids: (R, T); an image is `<img>`, 256 slots of any ids, `</img>`.
            attention_mask: (R, T) with 1 for tokens that are there, or (R, 1, T, T) as the backend takes it.
            position_ids: (R, T) or (1, T).
            past_key_values: the cache of earlier tokens.
            inputs_embeds: (R, T, D) in the place of `input_ids`.
            pixel_values: (N, 3, H, W), in the order of the images in the rows.
            use_cache: whether to keep keys and values; the config says so otherwise.
            **kwargs: to the attention backend.

        Raises:
            ValueError: pixels and places of images do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        embeds, features = self._with_images(embeds, input_ids, pixel_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        places = self._places(embeds, position_ids, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = F.dropout(embeds, p=self.config.emb_dropout_prob, training=self.training)
        for block in self.h:
            hidden = block(
                hidden,
                places=places,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return QwenVLOutput(
            last_hidden_state=self.ln_f(hidden),
            past_key_values=past_key_values if use_cache else None,
            image_hidden_states=features,
        )

    def _with_images(
        self, embeds: Tensor, input_ids: Tensor | None, pixel_values: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings with the images' features in their slots, and those features (N, 256, D)."""
        if pixel_values is None:
            # one token is an answer's: no need to wait for the device to say so
            if input_ids is not None and input_ids.shape[1] > 1 and self._slots(embeds, input_ids).any():
                raise ValueError("There are images in input_ids, but pixel_values is missing.")
            return self._without_images(embeds), None
        slots = self._slots(embeds, input_ids)
        count, wanted = int(slots.sum()), len(pixel_values) * IMAGE_TOKENS
        if count != wanted:
            raise ValueError(
                f"{len(pixel_values)} images in pixel_values need {wanted} slots between <img> and </img>; "
                f"input_ids has {count}."
            )
        features = self.get_image_features(pixel_values)
        return embeds.masked_scatter(slots[..., None], features.to(embeds.device, embeds.dtype)), features

    def _slots(self, embeds: Tensor, input_ids: Tensor | None) -> Tensor:
        """(R, T) bool: between `<img>` and `</img>`, which are known by their embeddings where ids are not given."""
        marks = torch.tensor([self.config.image_start_id, self.config.image_end_id], device=embeds.device)
        if input_ids is None:
            starts, ends = ((embeds == mark).all(dim=-1) for mark in self.wte(marks).to(embeds.dtype))
        else:
            starts, ends = (input_ids == mark for mark in marks)
        return (starts.cumsum(dim=1) > ends.cumsum(dim=1)) & ~starts

    def _without_images(self, embeds: Tensor) -> Tensor:
        """Text alone; in training a tuned tower still sees a blank image, whose features count nothing.

        So its parameters have gradients (of zero) in every step, on every process alike.
        """
        if not self.training or not any(parameter.requires_grad for parameter in self.visual.parameters()):
            return embeds
        return embeds + (self.get_image_features(self.visual.blank_image()).mean() * 0).to(embeds.dtype)

    def _places(self, embeds: Tensor, position_ids: Tensor | None, cache: Cache | None) -> Places:
        """Rotary factors and logN of the tokens; see the class for the rules."""
        config = self.config
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        level = torch.zeros(1, dtype=torch.long, device=embeds.device)
        if past:
            level = getattr(cache, "ntk_level", level).to(embeds.device)
        elif config.use_dynamic_ntk and not self.training:
            level = ntk_level(position_ids.amax(dim=1) + 1, config.seq_length)
            if cache is not None:
                cache.ntk_level = level
        cos, sin = rotary(position_ids, level, width=config.kv_channels, base=config.rotary_emb_base)
        scaled = config.use_logn_attn and not self.training
        return Places(cos, sin, logn(position_ids, config.seq_length) if scaled else None)


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) -> features (N, 256, D)."""
        return self.transformer.get_image_features(pixel_values)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> QwenVLCausalLMOutput:
        """Logits (R, T, V), and the loss where `labels` (R, T) are given; see `QwenVLModel.forward`."""
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return QwenVLCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
